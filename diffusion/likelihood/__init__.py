"""Likelihoods: lower bounds on log p(x_0) in nats, as terms that add up.

log p(x_0) ≥ 𝓛 = E_q[ log p(x_{0:T}) / q(x_{1:T}|x_0) ]                  elbo         the ELBO, by Jensen's inequality
log p(x_0) ≥ E[ log 1/K Σ_k p(x_{0:T})/q(x_{1:T}|x_0) ]                  importance   tighter for every larger K
log p(x_0) ≥ E_{q(x_1|x_0)}[ log p_ode(x_1)·p_θ(x_0|x_1)/q(x_1|x_0) ]    flow         for another model of x_1
"""
