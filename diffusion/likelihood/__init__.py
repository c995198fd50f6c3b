"""Likelihoods: bounds on log p(x_0), in nats, as contributions to be added up.

log p(x_0) ≥ 𝓛 = E_q[ log p(x_{0:T}) / q(x_{1:T}|x_0) ]             the ELBO, by Jensen      elbo
log p(x_0) ≥ E[ log 1/K Σ_k p(x_{0:T})/q(x_{1:T}|x_0) ]             tighter with every K     importance
log p(x_0) ≥ E_{q(x_1|x_0)}[ log p_ode(x_1) p_θ(x_0|x_1)/q(x_1|x_0) ]   another model of x_1     flow
"""
