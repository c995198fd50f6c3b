"""The implementation for CPUs: the networks, and the compiler options that make them fast (benchmarks/NOTES.md)."""

from diffusion.networks.cpu.compilation import compile, fold
from diffusion.networks.cpu.unet import UNet
from diffusion.networks.plain import pack, unpack

NETWORKS = {'unet': UNet}

__all__ = ['NETWORKS', 'compile', 'fold', 'pack', 'unpack']
