"""Networks, flax.nnx modules that map (x_t, t) to an output of x_t's size, and their implementations.

An implementation is a module that defines the functions of `plain` and a dict NETWORKS, whose entries replace those of
the table below: faster networks with the same parameter tree.
"""

from diffusion.networks import cpu, gpu, plain
from diffusion.networks.adm import ADM
from diffusion.networks.dit import DiT
from diffusion.networks.precision import round_parameters
from diffusion.networks.program import Program
from diffusion.networks.streams import make_rngs
from diffusion.networks.unet import UNet

NETWORKS = {'unet': UNet, 'adm': ADM, 'dit': DiT}
IMPLEMENTATIONS = {'plain': plain, 'cpu': cpu, 'gpu': gpu}

__all__ = ['ADM', 'IMPLEMENTATIONS', 'NETWORKS', 'DiT', 'Program', 'UNet', 'make_rngs', 'round_parameters']
