"""The implementation for CPUs: the networks, and the compiler options that make them fast (benchmarks/NOTES.md)."""

from diffusion.networks.cpu.compilation import compile, flops, fold
from diffusion.networks.cpu.unet import UNet

NETWORKS = {'unet': UNet}

__all__ = ['NETWORKS', 'compile', 'flops', 'fold']
