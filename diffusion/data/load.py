"""Load the images of one split."""

import os

from diffusion.data.cache import decoded
from diffusion.data.images import Images
from diffusion.data.pictures import MAX_PIXELS, Preprocessing
from diffusion.data.sources import open_source
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
) -> Images:
    """Load the images of one split; pictures are decoded once, into a file that later runs read.

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

    Returns:
        The images, uint8 (N, image_size, image_size, channels), with their labels.

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
    images = decoded(pictures, preprocess, directory=directory, max_bad_fraction=max_bad_fraction, keep=cache)
    if not len(images):
        raise ValueError(f'there are no images in {source!r}')
    return images
