"""Group normalization, as few passes over the image as can be."""

import jax
import jax.numpy as jnp
from flax import nnx


class GroupNorm(nnx.GroupNorm):
    """y = (x − mean)·rsqrt(variance + ε)·scale + bias, mean and variance over the pixels and channels of a group.

    x: (B, H, W, C). Returns float32, in which all is computed (Wu and He, arXiv:1803.08494).

    Sums over pixels come first, channel by channel: on CPUs several times faster than sums over groups at once. And
    the image is used as it is, not less its mean, which would be another array to keep for the way back.
    """

    def __call__(self, x):
        x = x.astype(jnp.float32)
        factor, offset = self.affine(x)
        return x * factor + offset

    def affine(self, x):
        """(factor, offset), (B, 1, 1, C) each, of which the norm of x is x·factor + offset. x: float32."""
        batch, height, width, channels = x.shape
        size = channels // self.num_groups

        def mean(values):
            """(B, C), of the group of each channel."""
            sums = values.sum((1, 2)).reshape(batch, self.num_groups, size).sum(2)
            return jnp.repeat(sums / (height * width * size), size, axis=1)

        first = mean(x)
        variance = jnp.maximum(mean(x * x) - first * first, 0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return factor[:, None, None], (self.bias[...] - first * factor)[:, None, None]
