"""Group normalization in few passes over the images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks import unet
from diffusion.networks.unet import Images


class GroupNorm(unet.GroupNorm):
    """Group normalization as x·factor + offset, computed and returned in float32.

    Sums over pixels come first, channel by channel, which on CPUs is several times faster than sums over groups at
    once. The mean is never subtracted from x: the difference would be kept for the backward pass.
    """

    def __call__(self, x: Images) -> Images:  # type: ignore[override]
        x = x.astype(jnp.float32)
        factor, offset = self.affine(x)
        return x * factor + offset

    def affine(self, x: Images) -> tuple[Float[Array, 'B 1 1 C'], Float[Array, 'B 1 1 C']]:
        """Return (factor, offset), for which the norm of x, float32, is x·factor + offset."""
        assert self.scale is not None and self.bias is not None
        batch, height, width, channels = x.shape
        size = channels // self.num_groups

        def mean(values):
            """(B, C): of each channel's group."""
            sums = values.sum((1, 2)).reshape(batch, self.num_groups, size).sum(2)
            return jnp.repeat(sums / (height * width * size), size, axis=1)

        first = mean(x)
        variance = jnp.maximum(mean(x * x) - first * first, 0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return factor[:, None, None], (self.bias[...] - first * factor)[:, None, None]
