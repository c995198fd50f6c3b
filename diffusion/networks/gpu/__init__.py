"""The implementation for GPUs, where each kernel costs microseconds: fewer kernels, and parameters as one vector."""

from diffusion.networks.gpu.packing import pack, unpack
from diffusion.networks.gpu.unet import UNet
from diffusion.networks.plain import compile, fold

NETWORKS = {'unet': UNet}

__all__ = ['NETWORKS', 'compile', 'fold', 'pack', 'unpack']
