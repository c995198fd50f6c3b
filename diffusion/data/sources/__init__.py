"""The sources of pictures, by the names that config.data.source gives them."""

import inspect
from collections.abc import Callable

from diffusion.data import pictures
from diffusion.data.sources.digits import open_digits
from diffusion.data.sources.folder import open_folder
from diffusion.data.sources.source import Source
from diffusion.data.sources.tfds import open_tfds

# Each is a function of (place, split, data_dir), and of max_pixels if it decodes files; place is what follows the name
# and a colon, or ''.
SOURCES: dict[str, Callable[..., Source]] = {
    'digits': open_digits,
    'folder': open_folder,
    'tfds': open_tfds,
}


def open_source(source: str, split: str, data_dir: str = '', max_pixels: int = pictures.MAX_PIXELS) -> Source:
    """Open one split of a source.

    Args:
        source: 'NAME' or 'NAME:PLACE', where NAME is a key of SOURCES.
        split: 'train', 'test', or another that the source has.
        data_dir: the folder that contains the data, for sources with files; '' is the source's default.
        max_pixels: larger pictures cannot be read.

    Returns:
        The pictures, not yet preprocessed.

    Raises:
        ValueError: there are no such pictures; the message names what was not found, where, and how to get it.
    """
    name, _, place = source.partition(':')
    if name not in SOURCES:
        raise ValueError(
            f'source is {source!r}, but must be NAME or NAME:PLACE, where NAME is one of {", ".join(SOURCES)}; '
            'to use your own pictures: --config.data.source=folder:/path/to/pictures'
        )
    limit = {'max_pixels': max_pixels} if 'max_pixels' in inspect.signature(SOURCES[name]).parameters else {}
    return SOURCES[name](place, split, data_dir, **limit)


__all__ = ['SOURCES', 'Source', 'open_source']
