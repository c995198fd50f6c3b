"""Guidance: nets made of two nets, a better one and a weaker one, from whose error the better one moves away."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Real

from diffusion import gaussian
from diffusion.gaussian import Images, Net
from diffusion.schedule import Schedule

Pair = Callable[[Images, Real[Array, 'B']], tuple[Images, Images]]  # (x_t, t) -> outputs of the net and the weak net


def guided(schedule: Schedule, net: Net, pair: Pair, *, scale: float, interval: tuple[float, ...] = ()) -> Net:
    """Extrapolate from the weak net through the net, at noise levels in an interval.

        ε_w(x_t, t) = ε_weak + w·(ε − ε_weak)   if σ_lo < σ_t ≤ σ_hi, else ε,   σ_t = √((1−ᾱ_t)/ᾱ_t)

    It is classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598 Eq. 6, whose w is ours less 1) if the weak
    net knows no class, and autoguidance (Karras et al. 2024, arXiv:2406.02507) if it is smaller or was trained less.
    The interval is that of Kynkäänniemi et al. 2024, arXiv:2404.07724. Outputs may be of any kind, because x̂_0 and v̂
    are affine in ε̂. Where no image of a batch is guided, the weak net is not evaluated.

    A learned variance, the second half of an output's last axis, is not guided: it is the net's own, as in the
    code of GLIDE (arXiv:2112.10741). The weak net may learn one as well, which is not used, or none.

    Args:
        schedule: the noise schedule.
        net: the net, (x_t (B, ...), t (B,)) -> (B, ...).
        pair: (x_t, t) -> (output of the net, output of the weak net).
        scale: w, a Python float, at least 0; 1 returns the net itself.
        interval: (σ_lo, σ_hi); () is all levels.

    Returns:
        The guided net.
    """
    if scale == 1:
        return net

    def everywhere(x_t: Images, t: Real[Array, 'B']) -> Images:
        output, weak = pair(x_t, t)
        return _extrapolated(x_t, output, weak, scale)

    def in_interval(x_t: Images, t: Real[Array, 'B']) -> Images:
        low, high = interval
        sigma = jnp.exp(-0.5 * schedule.log_snr(t))
        inside = (low < sigma) & (sigma <= high)

        def some(x_t: Images, t: Real[Array, 'B']) -> Images:
            output, weak = pair(x_t, t)
            return jnp.where(gaussian.like(inside, x_t), _extrapolated(x_t, output, weak, scale), output)

        return jax.lax.cond(inside.any(), some, net, x_t, t)

    return in_interval if interval else everywhere


def _extrapolated(x_t, output, weak, scale):
    """weak + w·(output − weak), but the net's own v, which follows its output if it learns the variance."""
    size = x_t.shape[-1]
    mean, weak = output[..., :size], weak[..., :size]
    guided_mean = weak + scale * (mean - weak)
    return guided_mean if output.shape[-1] == size else jnp.concatenate([guided_mean, output[..., size:]], axis=-1)


def halves(net: Net) -> Pair:
    """Make a pair from one evaluation of twice the batch.

    Args:
        net: (x_t (2B, ...), t (2B,)) -> (2B, ...). Its outputs 0, 2, … are of the net, 1, 3, … of the weak net, so that
            a device that holds an image holds both.

    Returns:
        The pair, for a batch of B.
    """

    def pair(x_t: Images, t: Real[Array, 'B']) -> tuple[Images, Images]:
        output = net(x_t.repeat(2, axis=0), t.repeat(2))
        both = output.reshape(len(x_t), 2, *output.shape[1:])
        return both[:, 0], both[:, 1]

    return pair
