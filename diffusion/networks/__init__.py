"""Networks, flax.nnx modules that map (x_t, t) to an output of x_t's shape, and their implementations.

An implementation is a module that defines the functions `compile`, `fold` and `flops` (see `plain`) and a dict
NETWORKS, whose entries replace those of the table below: faster networks with the same parameter tree.
"""

from diffusion.networks import cpu, plain
from diffusion.networks.unet import UNet

NETWORKS = {'unet': UNet}
IMPLEMENTATIONS = {'plain': plain, 'cpu': cpu}

__all__ = ['IMPLEMENTATIONS', 'NETWORKS', 'UNet']
