"""Choose what a config leaves open (0 in data.image_size, data.channels or model.channels) from the pictures."""

from collections import Counter
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import data
from diffusion.util import naming, say

CHOSEN = ('channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups')  # the keys of `choose_network`
LARGEST_SIZE = 64  # pixels: what a first network can be trained for


def is_complete(config: ConfigDict) -> bool:
    """Return whether the config leaves nothing open."""
    return bool(config.data.image_size and config.data.channels and config.model.channels)


def complete(config: ConfigDict) -> ConfigDict:
    """Return the config with everything that it leaves open chosen from a look at the pictures; print the choice.

    Raises:
        RunError: no picture can be decoded, or there are none.
    """
    config = config.copy_and_resolve_references()
    with naming('config.data'):
        asked = {key: config.data[key] for key in ('split', 'crop', 'data_dir', 'max_pixels')}
        seen = data.survey(config.data.source, **asked)
        if not seen.sizes:
            first = ''.join(f'\n    {name!r} {reason}' for name, reason in seen.bad[:5])
            raise ValueError(f'none of {seen.seen} pictures can be decoded. The first:{first}')
    if not config.data.image_size:
        config.data.image_size = choose_size(seen.sizes)
    if not config.data.channels:
        config.data.channels = 1 if seen.grey == sum(seen.sizes.values()) else 3
    if not config.model.channels:
        config.model.update(choose_network(config.data.image_size, seen.count))
    network = ' '.join(f'model.{key}={config.model[key]}' for key in CHOSEN).replace(', ', ',')
    say(
        f'{seen.count} pictures; chosen: data.image_size={config.data.image_size} '
        f'data.channels={config.data.channels} {network}'
    )
    return config


def choose_size(sizes: Counter, most: int = LARGEST_SIZE) -> int:
    """Choose an image size for pictures of the given sizes.

    If all pictures are squares of one size that the network can halve twice, it is that size. Otherwise it is the
    largest power of two that 99 of 100 pictures reach. It is never more than `most`.

    Args:
        sizes: how many pictures have each (height, width), in pixels.
        most: the largest size to choose.

    Returns:
        Height and width in pixels.
    """
    shorter = np.sort(np.repeat([min(size) for size in sizes], list(sizes.values())))
    one_size = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1 and shorter[0] <= most and shorter[0] % 4 == 0
    return int(shorter[0] if one_size else min(most, 2 ** int(np.log2(shorter[len(shorter) // 100]))))


def choose_network(image_size: int, num_images: int) -> dict[str, Any]:
    """Choose the width and depth of a U-Net, narrow on CPUs and for few images.

    Args:
        image_size: height and width in pixels.
        num_images: number of training images.

    Returns:
        The keys `CHOSEN` of config.model.
    """
    halvings = max(h for h in range(5) if image_size % 2**h == 0 and (h < 2 or image_size >> (h - 1) > 8))
    sizes = [image_size >> h for h in range(halvings + 1)]
    channels = 32 if jax.default_backend() == 'cpu' else 64 if num_images < 20_000 else 128
    return {
        'channels': channels,
        'multipliers': (1, 2, 2, 4, 4)[: halvings + 1],
        'num_blocks': 2,
        'attention_resolutions': tuple(size for size in sizes if size <= 16)[:1],
        'groups': 8 if channels == 32 else 32,
    }
