"""Load the images of one split."""

import dataclasses
import os
from collections.abc import Sequence

from diffusion.data.cache import decoded
from diffusion.data.images import Images, join
from diffusion.data.pictures import MAX_PIXELS, Preprocessing
from diffusion.data.sources import open_source
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
    num_shards: int = 1,
    shards: Sequence[int] | None = None,
) -> Images:
    """Load the images of one split; pictures are decoded once, into files that later runs read: one for each shard.

    It prints what the source found and left out.

    Args:
        source: 'NAME' or 'NAME:PLACE', where NAME is a key of `sources.SOURCES`.
        split: 'train', 'test', or another that the source has; of a folder, also the path of a folder in it.
        image_size: height and width of the images, in pixels.
        channels: 1 (grey) or 3 (colour).
        crop: a key of `pictures.CROPS`.
        data_dir: the folder that contains the data; '' is the source's default.
        cache: keep the decoded images on disk. If False, they are decoded whenever they are needed.
        cache_dir: the folder of decoded images; '' is $XDG_CACHE_HOME/diffusion.
        max_bad_fraction: pictures that cannot be used are left out; a larger fraction of them is an error.
        max_pixels: larger pictures cannot be used.
        num_shards: number of parts that the pictures are divided into.
        shards: which of these parts are loaded, from 0; None means all.

    Returns:
        The images, uint8 (N, image_size, image_size, channels), with their labels. If there are several parts, the
        record also has 'pictures_sha256', a digest of the names and sizes of all pictures of the split.

    Raises:
        ValueError: there are no such images, or an argument is invalid. The message names what was not found and how
            to get it.
    """
    preprocess = Preprocessing(crop, image_size, channels)
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f'max_bad_fraction is {max_bad_fraction}, but must be in [0, 1]')
    pictures = open_source(source, split, data_dir, max_pixels)
    for line in pictures.about:
        say(line)
    directory = os.path.expanduser(cache_dir) or cache_folder()
    loaded = []
    for i in range(num_shards) if shards is None else shards:
        part = shard(pictures, i, num_shards)
        images = decoded(part, preprocess, directory=directory, max_bad_fraction=max_bad_fraction, keep=cache)
        if not len(images):
            where = f', part {i} of data.shards={num_shards}: use fewer' if num_shards > 1 else ''
            raise ValueError(f'there are no images in {source!r}{where}')
        loaded.append(images)
    if num_shards == 1:
        return loaded[0]
    joined = join(loaded)
    return dataclasses.replace(joined, record=joined.record | {'pictures_sha256': pictures.sha256_everywhere})
