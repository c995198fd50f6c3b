"""Conversion between other projects' files of weights and our parameters and settings."""

from collections.abc import Callable

from diffusion.interop import ddim, diffusers
from diffusion.interop.tensors import Found

# read(place, *, image_size) -> Found. Raises ValueError if the files cannot be read or hold another kind of network.
READERS: dict[str, Callable[..., Found]] = {'diffusers': diffusers.read, 'ddim': ddim.read}

__all__ = ['READERS', 'Found']
