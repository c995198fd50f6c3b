"""From the bytes of a picture to the uint8 array that a network sees."""

import dataclasses
import hashlib
import io
import json
import warnings
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps
from PIL.Image import Resampling

warnings.simplefilter('error', Image.DecompressionBombWarning)  # a few bytes that would fill the memory


class Region(NamedTuple):
    """A square of an image, in pixels."""

    top: int
    left: int
    size: int


def whole(height, width):
    """All of it; it has to be square."""
    if height != width:
        raise ValueError(f'is {width}×{height}, which is no square: data.crop=center would cut it')
    return Region(0, 0, height)


def center(height, width):
    """The largest square in the middle: the same as to resize the shorter side, and to crop then."""
    size = min(height, width)
    return Region((height - size) // 2, (width - size) // 2, size)


def center_140(height, width):
    """The 140×140 pixels in the middle, which score_sde takes of CelebA."""
    return Region((height - 140) // 2, (width - 140) // 2, 140)


def ddim(height, width):
    """The 128×128 pixels around row 121, column 89, which the DDIM authors take of aligned CelebA (178×218)."""
    return Region(121 - 64, 89 - 64, 128)


# Each with the filter by which its authors resize; all of Pillow's are antialiased.
CROPS = {
    '': (whole, Resampling.LANCZOS),
    'center': (center, Resampling.LANCZOS),
    'center_140': (center_140, Resampling.BILINEAR),
    'ddim': (ddim, Resampling.BILINEAR),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to every picture: cut by CROPS[crop], resized to image_size, grey (1) or colour (3 channels)."""

    crop: str
    image_size: int
    channels: int

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f'crop is {self.crop!r}, but must be one of {", ".join(map(repr, CROPS))}')
        if self.image_size < 1:
            raise ValueError(f'image_size is {self.image_size}, but must be at least 1')
        if self.channels not in (1, 3):
            raise ValueError(f'channels is {self.channels}, but pictures have 1 (grey) or 3 (colour)')

    def record(self):
        """All that the pixels depend on."""
        return {
            'crop': self.crop,
            'filter': CROPS[self.crop][1].name.lower(),
            'image_size': self.image_size,
            'channels': self.channels,
            'pillow': PIL.__version__,
        }

    def fingerprint(self):
        """A short digest of `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:12]

    def __call__(self, content):
        """The array, uint8 (image_size, image_size, channels), of a picture's bytes. Raises ValueError as `decode`."""
        return self.apply(decode(content))

    def apply(self, image):
        """The same of a picture that `decode` returned. Raises ValueError where it is too small, or no square."""
        cut, resampling = CROPS[self.crop]
        top, left, size = cut(image.height, image.width)
        if top < 0 or left < 0 or top + size > image.height or left + size > image.width:
            raise ValueError(f'is {image.width}×{image.height}, too small for data.crop={self.crop}')
        if size < self.image_size:
            raise ValueError(
                f'is {image.width}×{image.height}, smaller than data.image_size={self.image_size}, and is not enlarged'
            )
        image = image.convert('L' if self.channels == 1 else 'RGB')
        if size != self.image_size or (size, size) != image.size:
            target = (self.image_size, self.image_size)
            image = image.crop((left, top, left + size, top + size)).resize(target, resampling)
        return np.asarray(image).reshape(self.image_size, self.image_size, self.channels)


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: what the camera noted is lost, but the pixels are there
        return image.copy()


def decode(content):
    """A picture's bytes as a Pillow image in grey ('L') or colour ('RGB').

    Turned upright by its EXIF orientation; of an animation the first frame; 16 bits rounded to 8; what is
    transparent over white; CMYK and palettes to RGB. Raises ValueError, which says why, where it is no
    picture, damaged, or of floats.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            image = _upright(image)
    except PIL.UnidentifiedImageError as error:
        raise ValueError('is no picture of a known format' if content else 'is empty') from error
    except Exception as error:  # Pillow's decoders raise whatever they like: a damaged file must not end a run
        raise ValueError(f'cannot be decoded ({type(error).__name__}: {str(error)[:200]})') from error
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError('has values beyond 16 bits')
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == 'F':
        raise ValueError('holds floating-point numbers, whose range is not known')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')
    return image if image.mode in ('L', 'RGB') else image.convert('L' if image.mode == '1' else 'RGB')
