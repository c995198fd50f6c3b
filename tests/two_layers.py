"""A config whose network has two layers: it compiles in a fraction of the U-Net's time.

For runs that are not about the network: `tests.runs.quick` in one process, `--config=tests/two_layers.py` in another.
"""

import jax.numpy as jnp
from flax import nnx

from diffusion.configs import digits
from diffusion.networks import NETWORKS


class TwoLayers(nnx.Module):
    """conv(dropout(silu(conv(x) + linear(t)))); the last convolution starts at zero, as that of the U-Net does."""

    def __init__(self, *, image_channels, channels, dropout, dtype, rngs):
        zeros = nnx.initializers.zeros_init()
        self.conv_in = nnx.Conv(image_channels, channels, (3, 3), dtype=dtype, rngs=rngs)
        self.time = nnx.Linear(1, channels, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.conv_out = nnx.Conv(channels, image_channels, (3, 3), kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, *, deterministic=True, rngs=None):
        h = nnx.silu(self.conv_in(x) + self.time(t.astype(jnp.float32)[:, None])[:, None, None])
        return self.conv_out(self.dropout(h, deterministic=deterministic, rngs=rngs)).astype(jnp.float32)


NETWORKS['two layers'] = TwoLayers


def get_config():
    config = digits.get_config()
    config.model.network = 'two layers'
    return config
