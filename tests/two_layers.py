"""A config whose network has two layers: it compiles in a fraction of the U-Net's time.

For runs that are not about the network: `tests.runs.quick` in one process, `--config=tests/two_layers.py` in another.
"""

import jax.numpy as jnp
from flax import nnx

from diffusion.configs import digits
from diffusion.networks import NETWORKS


class TwoLayers(nnx.Module):
    """conv(dropout(silu(conv(x) + linear(t)))); the last convolution starts at zero, as that of the U-Net does.

    A conditional network adds to linear(t) the row of the image's class; the last row stands for no class.
    """

    def __init__(self, *, image_channels, channels, dropout, dtype, rngs, num_classes=0, out_channels=0):
        zeros = nnx.initializers.zeros_init()
        self.conv_in = nnx.Conv(image_channels, channels, (3, 3), dtype=dtype, rngs=rngs)
        self.time = nnx.Linear(1, channels, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        last = dict(kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.conv_out = nnx.Conv(channels, out_channels or image_channels, (3, 3), **last)
        self.label = nnx.Embed(num_classes + 1, channels, rngs=rngs) if num_classes else None

    def __call__(self, x, t, labels=None, *, deterministic=True, rngs=None):
        emb = self.time(t.astype(jnp.float32)[:, None])
        if self.label is not None:
            emb += self.label(jnp.full(t.shape, -1) if labels is None else labels)
        h = nnx.silu(self.conv_in(x) + emb[:, None, None])
        return self.conv_out(self.dropout(h, deterministic=deterministic, rngs=rngs)).astype(jnp.float32)


NETWORKS['two layers'] = TwoLayers


def get_config():
    config = digits.get_config()
    config.model.network = 'two layers'
    return config
