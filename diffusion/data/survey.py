"""Look at a sample of the pictures of a source."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion.data.pictures import MAX_PIXELS, Preprocessing
from diffusion.data.sources import open_source


@dataclasses.dataclass(frozen=True)
class Survey:
    """The properties of an evenly spaced sample of the pictures of a source.

    Attributes:
        count: number of all pictures.
        seen: number of pictures in the sample.
        bad: (name, reason) of those in the sample that cannot be decoded or preprocessed.
        sizes: number of pictures of each (height, width), before preprocessing.
        grey: number of pictures without colour.
        about: what the source found and left out, in lines for the user.
        images: (n, H, W, C) uint8, the sample after preprocessing; None if it was not asked for or all are bad.
    """

    count: int
    seen: int
    bad: list[tuple[str, str]]
    sizes: collections.Counter[tuple[int, int]]
    grey: int
    about: Sequence[str]
    images: UInt8[np.ndarray, 'n H W C'] | None


class _Look(NamedTuple):
    """The properties of one picture; `reason` is not '' if it cannot be used."""

    size: tuple[int, int] | None = None
    grey: bool = False
    image: UInt8[np.ndarray, 'H W C'] | None = None
    reason: str = ''


def survey(
    source: str,
    split: str = 'train',
    *,
    image_size: int = 0,
    channels: int = 0,
    crop: str = '',
    data_dir: str = '',
    max_pixels: int = MAX_PIXELS,
    most: int = 1000,
) -> Survey:
    """Look at up to `most` pictures of a source, within seconds and without its cache.

    Args:
        source: as in `load`.
        split: as in `load`.
        image_size: height and width of the images, in pixels; 0 leaves out the preprocessing.
        channels: as in `load`.
        crop: as in `load`.
        data_dir: as in `load`.
        max_pixels: as in `load`.
        most: the largest size of the sample.

    Returns:
        The properties of the sample.

    Raises:
        ValueError: there are no such pictures, or an argument is invalid.
    """
    preprocess = Preprocessing(crop, image_size, channels) if image_size else None
    pictures = open_source(source, split, data_dir, max_pixels)

    def look(i: int) -> _Look:
        try:
            picture = pictures.read(i)
        except ValueError as error:
            return _Look(reason=str(error))
        size, grey = picture.shape[:2], bool((picture == picture[..., :1]).all())
        try:
            return _Look(size, grey, preprocess(picture) if preprocess else None)
        except ValueError as error:
            return _Look(size, grey, reason=str(error))

    numbers = np.unique(np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int)).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = list(pool.map(look, numbers))
    images = [found.image for found in looks if found.image is not None]
    return Survey(
        count=len(pictures),
        seen=len(looks),
        bad=[(pictures.names[i], found.reason) for i, found in zip(numbers, looks, strict=True) if found.reason],
        sizes=collections.Counter(found.size for found in looks if found.size),
        grey=sum(found.grey for found in looks),
        about=pictures.about,
        images=np.asarray(images) if images else None,
    )
