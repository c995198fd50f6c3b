"""Choose what a config leaves open from the pictures.

0 leaves open data.image_size, data.channels, model.channels and data.shards. The last is chosen when images are loaded.
"""

import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import data
from diffusion.data.sources import open_source
from diffusion.networks import NETWORKS
from diffusion.util import RunError, naming, say, signature

CHOSEN = ('channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups')  # the keys of `choose_network`
LARGEST_SIZE = 64  # pixels: what a first network can be trained for
WHOLE = 8_000_000_000  # bytes of decoded images, up to which each host keeps all of them
SHARDS = (1, 2, 4, 8, 16, 32, 64)
PICTURES_OF_SHARD = 100  # in each shard, at least


def is_complete(config: ConfigDict) -> bool:
    """Return whether the config leaves nothing open."""
    classes_known = config.model.num_classes or not config.data.labels
    return bool(config.data.image_size and config.data.channels and config.model.channels and classes_known)


def complete(config: ConfigDict, platform: str | None = None) -> ConfigDict:
    """Return the config with everything that it leaves open chosen from a look at the pictures; print the choice.

    Args:
        config: the config of the command.
        platform: of the devices that the network is for; None is that of this process.

    Raises:
        RunError: no picture can be decoded, or there are none.
    """
    config = config.copy_and_resolve_references()
    if config.data.labels and not config.model.num_classes:
        config.model.num_classes = count_classes(config)
    if is_complete(config):
        return config
    with naming('config.data'):
        asked = {key: config.data[key] for key in ('split', 'crop', 'data_dir', 'max_pixels')}
        seen = data.survey(config.data.source, **asked)
        if not seen.sizes:
            first = ''.join(f'\n    {name!r} {reason}' for name, reason in seen.bad[:5])
            raise ValueError(f'none of {seen.seen} pictures can be decoded. The first:{first}')
    if not config.data.image_size:
        with naming('config.data.image_size'):
            config.data.image_size = choose_size(seen.sizes)
            require_similar(config.data.image_size, seen.sizes)
        leave_out(config, seen.sizes)
    if not config.data.channels:
        total = seen.sizes.total()
        config.data.channels = 1 if seen.grey == total else 3
        if 0 < total - seen.grey <= total // 20:
            say(f'only {total - seen.grey} of {total} pictures have colour; --config.data.channels=1 makes them grey')
    if not config.model.channels:
        require_unet(config)
        given = {key.removeprefix('model.') for key in config.command.overrides} - {'channels'}
        chosen = choose_network(config.data.image_size, seen.count, platform or jax.default_backend())
        config.model.update({key: value for key, value in chosen.items() if key not in given})
    network = ' '.join(f'model.{key}={config.model[key]}' for key in CHOSEN).replace(', ', ',')
    say(
        f'{seen.count} pictures; chosen: data.image_size={config.data.image_size} '
        f'data.channels={config.data.channels} {network}'
    )
    return config


def count_classes(config: ConfigDict) -> int:
    """Return the number of classes of the source.

    Raises:
        RunError: it has none.
    """
    with naming('config.data'):
        pictures = open_source(config.data.source, config.data.split, config.data.data_dir, config.data.max_pixels)
    if not pictures.classes:
        why = ''.join(f' ({line})' for line in pictures.about if line.startswith('no labels'))
        raise RunError(
            f'config.data.labels is True, but the pictures of config.data.source={config.data.source!r} have no '
            f'classes{why}: put the pictures of each class into a folder of its own, or use --config.data.labels=False'
        )
    return len(pictures.classes)


def choose_size(sizes: Counter, most: int = LARGEST_SIZE) -> int:
    """Choose an image size for pictures of the given sizes.

    If the pictures are squares of one size that the network can halve twice, it is that size. Otherwise it is the
    largest power of two that the pictures reach. Outliers are ignored, and so are 1 % of the other pictures, or one of
    them if there are 20 to 99. The size is never more than `most`.

    Args:
        sizes: how many pictures have each (height, width), in pixels.
        most: the largest size to choose.

    Returns:
        Height and width in pixels.
    """
    sizes = sizes - outliers(sizes)
    total = sizes.total()
    few = total // 100 or int(total >= 20)
    (height, width), count = sizes.most_common(1)[0]
    if height == width <= most and height % 4 == 0 and total - count <= few:
        return height
    return min(most, 2 ** int(np.log2(_shorter_sides(sizes)[few])))


def outliers(sizes: Counter) -> Counter:
    """Return the sizes whose shorter side is less than a quarter of the median, if they are at most one in 20."""
    shorter = _shorter_sides(sizes)
    median = shorter[(len(shorter) - 1) // 2]
    found = Counter({size: count for size, count in sizes.items() if 4 * min(size) < median})
    return found if found.total() <= max(1, len(shorter) // 20) else Counter()


def require_similar(size: int, sizes: Counter, most: int = LARGEST_SIZE) -> None:
    """Raise ValueError if many pictures would be made far smaller than they are, for the sake of a few."""
    shorter = _shorter_sides(sizes)
    common = min(most, 2 ** int(np.log2(shorter[(len(shorter) - 1) // 2])))
    if 4 * size < common:
        smaller = int((shorter < common).sum())
        fraction = math.ceil(100 * smaller / len(shorter)) / 100
        raise ValueError(
            f'the pictures differ too much in size to choose one: half of them reach {common}×{common}, but {smaller} '
            f'of {len(shorter)} are smaller, down to less than {2 * size}×{2 * size}. Remove those, or choose by hand, '
            f'such as --config.data.image_size={common} --config.data.max_bad_fraction={fraction}'
        )


def leave_out(config: ConfigDict, sizes: Counter) -> None:
    """Allow that pictures smaller than the chosen image size are left out, and say how many there are."""
    size = config.data.image_size
    smaller = {found: count for found, count in sizes.items() if min(found) < size}
    if not smaller:
        return
    count, total = sum(smaller.values()), sizes.total()
    # Pictures that cannot be decoded keep the fraction that is allowed for them.
    allowed = config.data.max_bad_fraction + math.ceil(1000 * count / total) / 1000
    config.data.max_bad_fraction = round(min(1.0, allowed), 3)
    some = ', '.join(f'{width}×{height}' for height, width in list(smaller)[:5])
    say(
        f'{count} of {total} pictures are left out, because they are smaller than {size}×{size} ({some}'
        f'{" …" * (len(smaller) > 5)}); chosen for that: data.max_bad_fraction={config.data.max_bad_fraction:g}'
    )


def _shorter_sides(sizes: Counter) -> np.ndarray:
    """The shorter side of each picture, the shortest first."""
    return np.sort(np.repeat([min(size) for size in sizes], list(sizes.values())))


def require_unet(config: ConfigDict) -> None:
    """Raise RunError if a U-Net would be chosen for another kind of network, which does not take its keys."""
    if 'multipliers' not in signature(NETWORKS[config.model.network]).parameters:
        raise RunError(
            'config.model.channels is 0, which chooses a U-Net for the pictures, but config.model.network is '
            f'{config.model.network!r}: give its channels'
        )


def choose_network(image_size: int, num_images: int, platform: str) -> dict[str, Any]:
    """Choose the width and depth of a U-Net, narrow on CPUs and for few images.

    Args:
        image_size: height and width in pixels.
        num_images: number of training images.
        platform: of the devices, such as 'gpu'.

    Returns:
        The keys `CHOSEN` of config.model.
    """
    halvings = max(h for h in range(5) if image_size % 2**h == 0 and (h < 2 or image_size >> (h - 1) > 8))
    sizes = [image_size >> h for h in range(halvings + 1)]
    channels = 32 if platform == 'cpu' else 64 if num_images < 20_000 else 128
    return {
        'channels': channels,
        'multipliers': (1, 2, 2, 4, 4)[: halvings + 1],
        'num_blocks': 2,
        'attention_resolutions': tuple(size for size in sizes if size <= 16)[:1],
        'groups': 8 if channels == 32 else 32,
    }


def choose_shards(config: ConfigDict, num_pictures: int) -> int:
    """Choose data.shards: 1 for images of up to 8 GB, else the largest of SHARDS that divides the batch.

    The number does not depend on the hosts, which may change from start to start.

    Args:
        config: a config that leaves neither image size nor channels open.
        num_pictures: number of training pictures.

    Returns:
        One of SHARDS, with which each shard has at least PICTURES_OF_SHARD pictures. It is 1 if each device is to keep
        all images (data.placement).
    """
    nbytes = num_pictures * config.data.image_size**2 * config.data.channels
    if nbytes <= WHOLE or config.data.placement == 'device':
        return 1
    most = max(1, num_pictures // PICTURES_OF_SHARD)
    return max(number for number in SHARDS if number <= most and config.train.batch_size % number == 0)
