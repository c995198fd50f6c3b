"""Load the images of one split."""

import os
from collections.abc import Callable, Sequence

from diffusion.data.cache import decoded, too_many
from diffusion.data.images import Images, join
from diffusion.data.pictures import MAX_PIXELS, Preprocessing
from diffusion.data.sources import Source, open_source
from diffusion.data.sources.source import shard
from diffusion.util import cache_folder, say


def load(
    source: str,
    split: str = 'train',
    *,
    image_size: int,
    channels: int,
    crop: str = '',
    data_dir: str = '',
    cache: bool = True,
    cache_dir: str = '',
    max_bad_fraction: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    num_shards: int | Callable[[int], int] = 1,
) -> Images:
    """Load the images of one split. It prints what the source found and left out.

    Args:
        source: 'NAME' or 'NAME:PLACE', where NAME is a key of `sources.SOURCES`.
        split: 'train', 'test', or another that the source has; of a folder, also the path of a folder in it.
        image_size: height and width of the images, in pixels.
        channels: 1 (grey) or 3 (colour).
        crop: a key of `pictures.CROPS`.
        data_dir: the folder that contains the data; '' is the source's default.
        cache: see `decode`.
        cache_dir: see `decode`.
        max_bad_fraction: see `decode`.
        max_pixels: larger pictures cannot be used.
        num_shards: see `decode`; or a function that returns it for a number of pictures.

    Returns:
        The images, uint8 (N, image_size, image_size, channels), with their labels.

    Raises:
        ValueError: there are no such images, or an argument is invalid. The message names what was not found and how
            to get it.
    """
    preprocess = Preprocessing(crop, image_size, channels)
    pictures = open_pictures(source, split, data_dir, max_pixels)
    return decode(
        pictures,
        preprocess,
        cache=cache,
        cache_dir=cache_dir,
        max_bad_fraction=max_bad_fraction,
        num_shards=num_shards(len(pictures)) if callable(num_shards) else num_shards,
    )


def open_pictures(source: str, split: str, data_dir: str = '', max_pixels: int = MAX_PIXELS) -> Source:
    """Open one split of a source, and print what it found and left out. Arguments and errors as in `load`."""
    pictures = open_source(source, split, data_dir, max_pixels)
    if not len(pictures):
        raise ValueError(f'there are no images in {source!r}')
    for line in pictures.about:
        say(line)
    return pictures


def decode(
    pictures: Source,
    preprocess: Preprocessing,
    *,
    cache: bool = True,
    cache_dir: str = '',
    max_bad_fraction: float = 0.01,
    num_shards: int = 1,
    shards: Sequence[int] | None = None,
) -> Images:
    """Decode and preprocess pictures once, into files that later runs read: one for each shard.

    Args:
        pictures: of one split.
        preprocess: applied to each picture.
        cache: keep the decoded images on disk. If False, they are decoded whenever they are needed.
        cache_dir: the folder of decoded images; '' is $XDG_CACHE_HOME/diffusion.
        max_bad_fraction: pictures that cannot be used are left out; a larger fraction of them is an error. It is not
            checked if only some shards are loaded.
        num_shards: number of parts that the pictures are divided into.
        shards: which of these parts are loaded, from 0; None means all.

    Returns:
        The images, with their labels.

    Raises:
        ValueError: there are too few pictures, or too many cannot be used.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f'max_bad_fraction is {max_bad_fraction}, but must be in [0, 1]')
    directory = os.path.expanduser(cache_dir) or cache_folder()
    if num_shards == 1:
        return decoded(pictures, preprocess, directory=directory, max_bad_fraction=max_bad_fraction, keep=cache)
    if len(pictures) < num_shards:
        raise ValueError(f'{len(pictures)} pictures cannot be divided into data.shards={num_shards}: use fewer shards')
    numbers = range(num_shards) if shards is None else shards
    parts = [shard(pictures, number, num_shards) for number in numbers]
    joined = join([decoded(part, preprocess, directory=directory, max_bad_fraction=1.0, keep=cache) for part in parts])
    if shards is None:
        require_usable(len(joined), len(pictures), max_bad_fraction)
    return joined


def require_usable(usable: int, count: int, max_bad_fraction: float) -> None:
    """Raise ValueError if more than a fraction of `count` pictures, divided into shards, cannot be used."""
    bad = count - usable
    if bad > max_bad_fraction * count:
        advice = too_many(bad, count, max_bad_fraction)
        raise ValueError(f'{bad} of {count} pictures cannot be used, as the warnings above say. {advice}')
