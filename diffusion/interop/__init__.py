"""Conversion between other projects' files of weights and our parameters and settings."""

from collections.abc import Callable

from diffusion.interop import ddim, diffusers, openai
from diffusion.interop.tensors import Found

# read(place, *, image_size, …) -> Found. It may name other keys of config.model and config.interop, for what the files
# do not say. Raises ValueError if the files cannot be read, hold another kind of network, or need another such key.
READERS: dict[str, Callable[..., Found]] = {'diffusers': diffusers.read, 'openai': openai.read, 'ddim': ddim.read}

__all__ = ['READERS', 'Found']
