"""Likelihoods in closed form: linear networks and Gaussian chains, by the papers' formulas in float64.

Pixels are independent, so that every likelihood is a sum over the pixels of a given image x_0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from tests import oracles


@functools.cache
def alpha_bar(name, T, **how):
    """ᾱ_0 … ᾱ_T (T+1,) float64 of a schedule by its name."""
    return np.array([float(a) for a in oracles.alpha_bars(oracles.betas(name, T, **how))])


def log_normal(x, mean, var):
    """log N(x; mean, var)."""
    return -0.5 * (np.log(2 * np.pi * var) + (x - mean) ** 2 / var)


def kl_normal(mean_gap2, var1, var2):
    """KL of two normals from the (expected) squared gap between their means."""
    return 0.5 * (np.log(var2 / var1) + (var1 + mean_gap2) / var2 - 1)


@dataclasses.dataclass(frozen=True)
class LinearNet:
    """A network that is linear in every pixel: at each level x̂_0 = x0[0]·x_t + x0[1] and ε̂ = eps[0]·x_t + eps[1]."""

    alpha_bar: np.ndarray  # (T+1,)
    x0: np.ndarray  # (2, T+1)
    eps: np.ndarray  # (2, T+1)

    @classmethod
    def of_data(cls, mean, std, alpha_bar):
        """The optimal network for data x_0 ~ N(mean, std²): E[x_0|x_t] and E[ε|x_t] by regression on x_t."""
        var = alpha_bar * std**2 + 1 - alpha_bar  # of x_t
        x0, eps = np.sqrt(alpha_bar) * std**2 / var, np.sqrt(1 - alpha_bar) / var
        center = np.sqrt(alpha_bar) * mean  # of x_t
        return cls(alpha_bar, np.array([x0, mean - x0 * center]), np.array([eps, -eps * center]))

    @classmethod
    def of_reverse_means(cls, slopes, alpha_bar):
        """The network whose DDPM posterior mean (DDPM Eq. 7) at level t is slopes[t−1]·x_t."""
        a, before = alpha_bar[1:], alpha_bar[:-1]
        beta = 1 - a / before
        of_x0 = np.sqrt(before) * beta / (1 - a)
        of_x_t = np.sqrt(1 - beta) * (1 - before) / (1 - a)
        x0 = np.append(0.0, (np.asarray(slopes) - of_x_t) / of_x0)
        eps = np.append(0.0, (1 - np.sqrt(a) * x0[1:]) / np.sqrt(1 - a))
        return cls(alpha_bar, np.array([x0, 0 * x0]), np.array([eps, 0 * eps]))

    def output(self, kind):
        """Slope and offset (2, T+1) of the output of a network of this kind; v = √ᾱ·ε − √(1−ᾱ)·x_0."""
        v = np.sqrt(self.alpha_bar) * self.eps - np.sqrt(1 - self.alpha_bar) * self.x0
        return {'eps': self.eps, 'x0': self.x0, 'v': v}[kind]


def line(output):
    """The network of a `LinearNet.output` (2, T+1), which may be traced by JAX."""
    output = jnp.asarray(output, jnp.float32)

    def net(x_t, t):
        slope, offset = (c[t].reshape(t.shape + (1,) * (x_t.ndim - t.ndim)) for c in output)
        return slope * x_t + offset

    return net


class Chains:
    """q_σ(x_{1:T}|x_0) of DDIM's family and p(x_{0:T}) of a LinearNet, through `levels`, noisiest first.

    For pair i = (t, s): p(x_s|x_t) = N(A[i]·x_t + b[i], V[i]), where the kernel's x_0 and ε are the net's.
    The variances are σ² for 'small', 1−ᾱ_t/ᾱ_s for 'large', and for both at s = 0 the σ² of the pair before, as in
    Ho's and OpenAI's code, or 1−ᾱ_t if there is none; or an array. Latent i is x at levels[i].
    """

    def __init__(self, net, levels, eta, variance='small'):
        t, s = np.asarray(levels)[:-1], np.asarray(levels)[1:]
        self.a_t, self.a_s = a_t, a_s = net.alpha_bar[t], net.alpha_bar[s]
        self.sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)  # DDIM Eq. 16
        self.direction = np.sqrt(np.maximum(1 - a_s - self.sigma2, 0))
        self.A, self.b = np.sqrt(a_s) * net.x0[:, t] + self.direction * net.eps[:, t]  # DDIM Eq. 12
        if not isinstance(variance, str):
            self.V = np.asarray(variance, np.float64)
        else:
            self.V = 1 - a_t / a_s if variance == 'large' else self.sigma2.copy()
            self.V[-1] = self.sigma2[-2] if len(t) > 1 else 1 - a_t[0]

    @functools.cached_property
    def covariance(self):
        """(n, n), of the latents given x_0: q(x_T|x_0) first, then every kernel q_σ(x_s|x_t, x_0), DDIM Eq. 7."""
        n = len(self.a_t)
        covariance = np.zeros((n, n))
        covariance[0, 0] = 1 - self.a_t[0]
        for i in range(n - 1):
            c = self.direction[i] / np.sqrt(1 - self.a_t[i])
            covariance[i + 1, : i + 1] = covariance[: i + 1, i + 1] = c * covariance[i, : i + 1]
            covariance[i + 1, i + 1] = c**2 * covariance[i, i] + self.sigma2[i]
        return covariance

    def given(self, i, j):
        """(slope, variance) of latent i given latent j and x_0; j = n is x_0 itself. Gaussian conditioning."""
        C = self.covariance
        if j == len(C):
            return 0.0, C[i, i]
        return C[i, j] / C[j, j], C[i, i] - C[i, j] ** 2 / C[j, j]

    def elbo(self, x0, form='posterior'):
        """Expectations over q of (reconstruction, prior, consistency (n−1,)), with a Gaussian decoder; nats."""
        x0 = np.ravel(np.asarray(x0, np.float64))
        n, C = len(self.a_t), self.covariance
        mean = np.sqrt(self.a_t)[:, None] * x0  # (n, pixels)
        gap = x0 - self.A[-1] * mean[-1] - self.b[-1]
        reconstruction = -0.5 * (np.log(2 * np.pi * self.V[-1]) + (gap**2 + self.A[-1] ** 2 * C[-1, -1]) / self.V[-1])

        g, v = self.given(0, 1)
        if form == 'posterior':
            prior = -kl_normal(mean[0] ** 2, C[0, 0], 1.0)
        elif form == 'transition':
            prior = -0.5 * (np.log(2 * np.pi) + mean[0] ** 2 + C[0, 0]) + 0.5 * (np.log(2 * np.pi * v) + 1)
        else:
            below = C[1, 1] if n > 1 else 0.0
            prior = -kl_normal(mean[0] ** 2 + g**2 * below, v, 1.0)

        consistency = []
        for i in range(n - 1):
            A, b, V = self.A[i], self.b[i], self.V[i]
            gap2 = (mean[i + 1] - A * mean[i] - b) ** 2
            if form == 'posterior':
                g, v = self.given(i + 1, i)
                term = -kl_normal(gap2 + (g - A) ** 2 * C[i, i], v, V)
            elif form == 'transition':
                _, v = self.given(i + 1, i + 2)
                spread = C[i + 1, i + 1] - 2 * A * C[i + 1, i] + A**2 * C[i, i]
                term = -0.5 * (np.log(2 * np.pi * V) + (gap2 + spread) / V) + 0.5 * (np.log(2 * np.pi * v) + 1)
            else:
                g, v = self.given(i + 1, i + 2)
                below, across = (C[i + 2, i + 2], C[i + 2, i]) if i + 2 < n else (0.0, 0.0)
                term = -kl_normal(gap2 + g**2 * below - 2 * g * A * across + A**2 * C[i, i], v, V)
            consistency.append(term.sum())
        return reconstruction.sum(), prior.sum(), np.array(consistency)

    def log_p(self, x0):
        """log p(x_0) of the reverse chain from x_T ~ N(0, 1); nats."""
        mean, var = 0.0, 1.0
        for A, b, V in zip(self.A, self.b, self.V, strict=True):
            mean, var = A * mean + b, A**2 * var + V
        return log_normal(np.asarray(x0, np.float64), mean, var).sum()

    def log_weight(self, x0, draws):
        """log p(x_{0:T})/q_σ(x_{1:T}|x_0) of given draws (n, B, ...): x_T, then each x_s from its kernel; (B,)."""
        x0, draws = np.asarray(x0, np.float64), np.asarray(draws, np.float64)
        axes = tuple(range(1, x0.ndim))
        x = np.sqrt(self.a_t[0]) * x0 + np.sqrt(1 - self.a_t[0]) * draws[0]
        total = log_normal(x, 0.0, 1.0) - log_normal(x, np.sqrt(self.a_t[0]) * x0, 1 - self.a_t[0])
        for i in range(len(draws) - 1):
            mean = np.sqrt(self.a_s[i]) * x0
            mean = mean + self.direction[i] * (x - np.sqrt(self.a_t[i]) * x0) / np.sqrt(1 - self.a_t[i])
            p_mean = self.A[i] * x + self.b[i]
            x = mean + np.sqrt(self.sigma2[i]) * draws[i + 1]
            total += log_normal(x, p_mean, self.V[i]) - log_normal(x, mean, self.sigma2[i])
        return (total + log_normal(x0, self.A[-1] * x + self.b[-1], self.V[-1])).sum(axis=axes)


@dataclasses.dataclass(frozen=True)
class GaussianFlow:
    """The probability-flow ODE with the exact score of data N(mean, std²); ᾱ between levels is log-linear.

    It carries N(√ᾱ·mean, ᾱ·std² + 1−ᾱ) along, and so maps these onto each other linearly.
    """

    mean: float
    std: float
    alpha_bar: np.ndarray  # (T+1,); where it ends at 0, the level before stands for T

    def moments(self, level=1):
        """(mean, variance) of x at `level`, where x_T ~ N(0, 1)."""
        end = -1 if self.alpha_bar[-1] > 0 else -2
        (center, std), (center_T, std_T) = (
            (np.sqrt(a) * self.mean, np.sqrt(a * self.std**2 + 1 - a)) for a in self.alpha_bar[[level, end]]
        )
        return center - std / std_T * center_T, (std / std_T) ** 2

    def log_density(self, x, level=1):
        """log p_ode of every pixel of x at `level`."""
        return log_normal(np.asarray(x, np.float64), *self.moments(level))

    def net(self, kind):
        """The network of that score at real levels t (B,)."""
        return self.net_of(kind, self.log_alpha_bar())

    def log_alpha_bar(self):
        """log ᾱ_0 … log ᾱ_T (T+1,) float32; −inf where ᾱ is 0."""
        with np.errstate(divide='ignore'):
            return jnp.asarray(np.log(self.alpha_bar), jnp.float32)

    def net_of(self, kind, table):
        """The network of that score, with a table of log ᾱ that may be traced by JAX."""

        def net(x, t):
            below = jnp.floor(t).astype(jnp.int32)
            lower, upper = table[below], table[jnp.minimum(below + 1, len(table) - 1)]
            log_a = jnp.where(t == below, lower, lower + (t - below) * (upper - lower))
            log_a = log_a.reshape(t.shape + (1,) * (x.ndim - 1))
            signal, noise = jnp.exp(0.5 * log_a), jnp.sqrt(-jnp.expm1(log_a))
            away = (x - signal * self.mean) / (signal**2 * self.std**2 + noise**2)
            eps, x0 = noise * away, self.mean + signal * self.std**2 * away
            return {'eps': eps, 'x0': x0, 'v': signal * eps - noise * x0}[kind]

        return net

    def bound(self, x0, chains):
        """(reconstruction, entropy, density) in expectation over q(x_1|x_0), with the last step of `chains`."""
        x0 = np.ravel(np.asarray(x0, np.float64))
        a = self.alpha_bar[1]
        mean, var = self.moments()
        entropy = 0.5 * (np.log(2 * np.pi * (1 - a)) + 1) * len(x0)
        density = (log_normal(np.sqrt(a) * x0, mean, var) - 0.5 * (1 - a) / var).sum()
        return chains.elbo(x0)[0], entropy, density

    def log_p(self, x0, chains):
        """log p(x_0), x_1 from the ODE and x_0 from the last step of `chains`."""
        (mean, var), A, b, V = self.moments(), chains.A[-1], chains.b[-1], chains.V[-1]
        return log_normal(np.asarray(x0, np.float64), A * mean + b, A**2 * var + V).sum()


QUICK = {'xla_backend_optimization_level': 0}  # compiler options for programs that run for less time than they compile
DESIGN = 32  # images of a batch that `exact_expectations` needs


def exact_expectations(monkeypatch):
    """Replace normal draws by ±1 so that a mean over a batch of 32 equal images is an exact expectation.

    Every call of `jax.random.normal` gets another column of a Hadamard matrix, the same for all pixels: the first and
    second moments over the batch are those of independent N(0, 1). So every function that is quadratic in the draws and
    a sum over pixels has the right mean, without Monte-Carlo noise. Integers are not random either: each stratum has
    a single level, its first.
    """
    columns = iter(scipy.linalg.hadamard(DESIGN).T[1:])

    def normal(key, shape=(), dtype=jnp.float32):
        column = next(columns).reshape((DESIGN,) + (1,) * (len(shape) - 1))
        return jnp.broadcast_to(jnp.asarray(column, dtype), shape)

    monkeypatch.setattr(jax.random, 'normal', normal)
    monkeypatch.setattr(jax.random, 'randint', lambda key, shape, low, high, dtype: jnp.full(shape, low, dtype))


def assert_mean(values, expected, errors=4.5, atol=1e-5):
    """The mean of independent `values` (N,) is `expected`, within 4.5 of their standard errors."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - expected) < errors * error + atol, (values.mean(), expected, error)


def tiny_net(weights, x_t, t):
    """A nonlinear network of a few weights (w1 (3, H), w2 (H,)), pixel by pixel; T = 10 or thereabouts."""
    w1, w2 = weights
    level = jnp.broadcast_to(t.reshape(t.shape + (1,) * (x_t.ndim - 1)) / 10.0, x_t.shape)
    hidden = jnp.tanh(jnp.stack([x_t, level, jnp.ones_like(x_t)], axis=-1) @ w1)
    return 0.5 * x_t + hidden @ w2
