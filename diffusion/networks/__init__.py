"""Networks, flax.nnx modules that map (x_t, t) to an output of x_t's shape, and their implementations.

An implementation is a module with NETWORKS, the entries of the table below that it replaces by faster ones of the same
parameter tree, and with `compile`, `fold` and `flops`, which `plain` documents.
"""

from diffusion.networks import cpu, plain
from diffusion.networks.unet import UNet

NETWORKS = {'unet': UNet}
IMPLEMENTATIONS = {'plain': plain, 'cpu': cpu}

__all__ = ['IMPLEMENTATIONS', 'NETWORKS', 'UNet']
