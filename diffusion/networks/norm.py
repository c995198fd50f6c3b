"""Group normalization in few passes over the activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks import unet
from diffusion.networks.unet import Images


class GroupNorm(unet.GroupNorm):
    """Group normalization as x·factor + offset, computed and returned in float32.

    The sums run over the pixels of each channel first and then over the channels of each group. On CPUs this is several
    times faster than one sum over both. The mean is never subtracted from x, because the difference would be kept for
    the backward pass.
    """

    def __call__(self, x: Images) -> Images:  # type: ignore[override]
        x = x.astype(jnp.float32)
        factor, offset = self.affine(x)
        return x * factor + offset

    def affine(self, x: Images) -> tuple[Float[Array, 'B 1 1 C'], Float[Array, 'B 1 1 C']]:
        """Return (factor, offset), with which the normalized x is x·factor + offset; x is float32."""
        assert self.scale is not None and self.bias is not None
        batch, height, width, channels = x.shape
        size = channels // self.num_groups

        def mean(values):
            """The mean over the group of each channel, (B, C)."""
            sums = values.sum((1, 2)).reshape(batch, self.num_groups, size).sum(2)
            return jnp.repeat(sums / (height * width * size), size, axis=1)

        first = mean(x)
        variance = jnp.maximum(mean(x * x) - first * first, 0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return factor[:, None, None], (self.bias[...] - first * factor)[:, None, None]
