"""Closed forms by the papers' formulas in float64, without the code under test."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np


@functools.cache
def betas(name, T, beta_start=1e-4, beta_end=0.02, offset=0.008, max_beta=0.999):
    """β_1 … β_T as the papers define them, in mpmath's arithmetic of 40 digits."""
    import mpmath as mp

    mp.mp.dps = 40
    start, end = mp.mpf(beta_start), mp.mpf(beta_end)
    grid = [mp.mpf(i) / max(T - 1, 1) for i in range(T)]
    if name == 'linear':
        return [start + u * (end - start) for u in grid]
    if name == 'quadratic':
        return [(mp.sqrt(start) + u * (mp.sqrt(end) - mp.sqrt(start))) ** 2 for u in grid]
    if name == 'constant':
        return [end] * T
    if name == 'jsd':
        return [mp.mpf(1) / (T - i) for i in range(T)]
    if name == 'sigmoid':
        return [start + (end - start) / (1 + mp.exp(6 - 12 * u)) for u in grid]
    if name == 'cosine':
        f = [mp.cos(mp.pi / 2 * (mp.mpf(i) / T + mp.mpf(offset)) / (1 + mp.mpf(offset))) ** 2 for i in range(T + 1)]
        return [min(1 - f[i + 1] / f[i], mp.mpf(max_beta)) for i in range(T)]
    raise KeyError(name)


def alpha_bars(betas):
    """ᾱ_0 … ᾱ_T as mpmath numbers."""
    import mpmath as mp

    result = [mp.mpf(1)]
    for beta in betas:
        result.append(result[-1] * (1 - beta))
    return result


def _like(coefficient, x):
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


@dataclasses.dataclass(frozen=True)
class PointMass:
    """Data that is a single known image: the optimal network outputs x_0 for every x_t."""

    x0: float
    alpha_bar: np.ndarray  # (T+1,) float64

    def net(self, kind):
        alpha_bar = jnp.asarray(self.alpha_bar, jnp.float32)

        def net(x_t, t):
            signal, noise = _like(jnp.sqrt(alpha_bar[t]), x_t), _like(jnp.sqrt(1 - alpha_bar[t]), x_t)
            eps = (x_t - signal * self.x0) / noise
            return {'eps': eps, 'x0': jnp.full_like(x_t, self.x0), 'v': signal * eps - noise * self.x0}[kind]

        return net


@dataclasses.dataclass(frozen=True)
class GaussianData:
    """Data x_0 ~ N(mean, std²): the optimal predictor is linear, and so is every chain that uses it."""

    mean: float
    std: float
    alpha_bar: np.ndarray  # (T+1,) float64

    def slope(self, t):
        """E[ε | x_t] = slope·(x_t − √ᾱ_t·mean)."""
        a = self.alpha_bar[t]
        return np.sqrt(1 - a) / (a * self.std**2 + 1 - a)

    def net(self, kind):
        slopes = jnp.asarray([self.slope(t) for t in range(len(self.alpha_bar))], jnp.float32)
        alpha_bar = jnp.asarray(self.alpha_bar, jnp.float32)

        def net(x_t, t):
            signal, noise = _like(jnp.sqrt(alpha_bar[t]), x_t), _like(jnp.sqrt(1 - alpha_bar[t]), x_t)
            eps = _like(slopes[t], x_t) * (x_t - signal * self.mean)
            x0 = (x_t - noise * eps) / signal
            return {'eps': eps, 'x0': x0, 'v': signal * eps - noise * x0}[kind]

        return net

    def step(self, t, s, eta, variance='small'):
        """(A, b, V): the chain's x_s given x_t is N(A·x_t + b, V). DDIM Eq. 12 and 16; no noise at s = 0."""
        a_t, a_s = self.alpha_bar[t], self.alpha_bar[s]
        sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        k = self.slope(t)
        # ε̂ = k·x_t − k·√ᾱ_t·mean;   x̂_0 = (x_t − √(1−ᾱ_t)·ε̂)/√ᾱ_t
        eps = np.array([k, -k * np.sqrt(a_t) * self.mean])
        x0 = (np.array([1, 0]) - np.sqrt(1 - a_t) * eps) / np.sqrt(a_t)
        A, b = np.sqrt(a_s) * x0 + np.sqrt(1 - a_s - sigma2) * eps
        own = {'small': sigma2, 'large': 1 - a_t / a_s}[variance] if isinstance(variance, str) else variance
        return A, b, own if s > 0 else 0.0

    def sample_moments(self, levels, eta, variance='small'):
        """Mean and variance of x_0 of a chain that starts from x_T ~ N(0, 1)."""
        mean, var = 0.0, 1.0
        for i, (t, s) in enumerate(itertools.pairwise(levels)):
            A, b, V = self.step(t, s, eta, variance if isinstance(variance, str) else variance[i])
            mean, var = A * mean + b, A**2 * var + V
        return mean, var


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Data of several classes, equally many of each: x_0 ~ N(means[c], std²) in class c."""

    means: tuple[float, ...]
    std: float
    alpha_bar: np.ndarray  # (T+1,) float64

    def log_density(self, x, t, label=None):
        """log p_t(x | class), or log p_t(x) if there is none, up to a constant; `x` and `t` are (B,)."""
        a = self.alpha_bar[t]
        squares = [-((x - np.sqrt(a) * mean) ** 2) / (2 * (a * self.std**2 + 1 - a)) for mean in self.means]
        return np.logaddexp.reduce(squares) if label is None else squares[label]

    def eps(self, log_density, x, t, step=1e-5):
        """E[ε | x_t] = −√(1−ᾱ_t)·∇log p_t(x_t) (Vincent 2011), the gradient by a central difference."""
        slope = (log_density(x + step, t) - log_density(x - step, t)) / (2 * step)
        return -np.sqrt(1 - self.alpha_bar[t]) * slope

    def net(self, labels):
        """The optimal net of kind 'eps' for images of these classes; −1 is no class."""
        alpha_bar, means = jnp.asarray(self.alpha_bar, jnp.float32), jnp.asarray(self.means, jnp.float32)
        labels = jnp.asarray(labels)

        def net(x_t, t):
            a = alpha_bar[t][:, None]
            variance = a * self.std**2 + 1 - a
            distances = x_t[:, None] - jnp.sqrt(a) * means  # (B, classes)
            of_class = jnp.arange(len(self.means)) == labels[:, None]
            allowed = of_class | (labels < 0)[:, None]
            logits = jnp.where(allowed, -(distances**2) / (2 * variance), -jnp.inf)
            weights = jnp.exp(logits - logits.max(1, keepdims=True))
            return (jnp.sqrt(1 - a) * weights * distances / variance).sum(1) / weights.sum(1)

        return net
