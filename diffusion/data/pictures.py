"""Decode and preprocess pictures: from the bytes of a file to the uint8 image that a network is trained on."""

import dataclasses
import functools
import io
import struct
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps
from PIL.Image import Resampling

from diffusion.util import json_sha256

MAX_PIXELS = 89_478_485  # Pillow warns above this number
BYTES_PER_PIXEL = 8  # at most, uncompressed: 4 channels of 16 bits

# The formats that are read, with the suffixes of their files. Pillow decodes these within the process; for some others
# it would start programs, such as Ghostscript for EPS.
FORMATS = {
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif', '.jif', '.pjpeg', '.mpo'),
    'PNG': ('.png', '.apng'),
    'WEBP': ('.webp',),
    'GIF': ('.gif',),
    'BMP': ('.bmp',),
    'TIFF': ('.tif', '.tiff'),
    'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    'JPEG2000': ('.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx'),
    'AVIF': ('.avif', '.avifs'),
    'QOI': ('.qoi',),
    'ICO': ('.ico',),
    'SGI': ('.sgi', '.rgb', '.rgba', '.bw'),
}


def suffixes() -> tuple[str, ...]:
    """Return the suffixes of all FORMATS, in lower case."""
    return tuple(suffix for known in FORMATS.values() for suffix in known)


class Region(NamedTuple):
    """A square of a picture, in pixels."""

    top: int
    left: int
    size: int


def whole(height: int, width: int) -> Region:
    """Return the whole picture.

    Raises:
        ValueError: the picture is not square.
    """
    if height != width:
        raise ValueError(f'is {width}×{height}, which is not square; data.crop=center would crop it')
    return Region(0, 0, height)


def center(height: int, width: int) -> Region:
    """Return the largest square in the center: equivalent to resizing the shorter side before cropping."""
    size = min(height, width)
    return Region((height - size) // 2, (width - size) // 2, size)


def center_140(height: int, width: int) -> Region:
    """Return the central 140×140 pixels, as score_sde crops CelebA."""
    return Region((height - 140) // 2, (width - 140) // 2, 140)


def ddim(height: int, width: int) -> Region:
    """Return the 128×128 pixels around row 121, column 89, as the DDIM authors crop aligned CelebA (178×218)."""
    return Region(121 - 64, 89 - 64, 128)


class Crop(NamedTuple):
    """A crop and the filter with which its authors resize; all of Pillow's filters are antialiased."""

    region: Callable[[int, int], Region]  # of (height, width)
    resampling: Resampling


CROPS = {
    '': Crop(whole, Resampling.LANCZOS),
    'center': Crop(center, Resampling.LANCZOS),
    'center_140': Crop(center_140, Resampling.BILINEAR),
    'ddim': Crop(ddim, Resampling.BILINEAR),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Crop every picture by CROPS[crop], convert it to grey or colour, and resize it to image_size × image_size.

    Args:
        crop: a key of CROPS.
        image_size: height and width of the images, in pixels.
        channels: 1 (grey) or 3 (colour).

    Raises:
        ValueError: one of them is invalid.
    """

    crop: str
    image_size: int
    channels: int

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f'crop is {self.crop!r}, but must be one of {", ".join(map(repr, CROPS))}')
        if self.image_size < 1:
            raise ValueError(f'image_size is {self.image_size}, but must be at least 1')
        if self.channels not in (1, 3):
            raise ValueError(f'channels is {self.channels}, but must be 1 (grey) or 3 (colour)')

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (image_size, image_size, channels)."""
        return self.image_size, self.image_size, self.channels

    def record(self) -> dict[str, Any]:
        """Return everything that determines the pixels, as JSON."""
        return {
            'crop': self.crop,
            'filter': CROPS[self.crop].resampling.name.lower(),
            'image_size': self.image_size,
            'channels': self.channels,
            'pillow': PIL.__version__,
        }

    def fingerprint(self) -> str:
        """Return a short digest of `record`."""
        return json_sha256(self.record())[:12]

    def __call__(self, picture: UInt8[np.ndarray, 'H W C']) -> UInt8[np.ndarray, 'size size channels']:
        """Preprocess one picture.

        Args:
            picture: (H, W, 1 or 3), values in 0 … 255.

        Returns:
            The image, (image_size, image_size, channels), values in 0 … 255.

        Raises:
            ValueError: the picture is not such an array, is too small, or is not square where it must be.
        """
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3):
            raise ValueError(f'is an array of {picture.dtype} {picture.shape}, but must be of uint8 (H, W, 1 or 3)')
        crop, (height, width, _) = CROPS[self.crop], picture.shape
        top, left, size = crop.region(height, width)
        if top < 0 or left < 0 or top + size > height or left + size > width:
            raise ValueError(f'is {width}×{height}, too small for data.crop={self.crop}')
        if size < self.image_size:
            raise ValueError(
                f'is {width}×{height}, which is smaller than data.image_size={self.image_size}: choose a smaller one, '
                'because pictures are not enlarged'
            )
        square = picture[top : top + size, left : left + size]
        image = Image.fromarray(square[..., 0] if picture.shape[2] == 1 else square)
        image = image.convert('L' if self.channels == 1 else 'RGB')
        if size != self.image_size:
            image = image.resize((self.image_size, self.image_size), crop.resampling)
        return np.asarray(image).reshape(self.shape)


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, 'H W C']:
    """Decode the bytes of a picture file.

    The EXIF orientation is applied. An animation gives its first frame. Pictures of 16 bits become 8-bit pictures: grey
    values are rounded, and colours lose their lower 8 bits. Transparent pixels are blended with white. Palettes and
    CMYK are converted to RGB.

    Args:
        content: the whole file, in one of FORMATS, whatever its name.
        max_pixels: a picture with more pixels is not decoded.

    Returns:
        The picture, (H, W, 1) in grey or (H, W, 3) in RGB, values in 0 … 255.

    Raises:
        ValueError: the content is not a picture, is damaged, has too many pixels or floating-point values. The
            message is a predicate, such as 'is empty'; the caller puts the picture's name before it.
    """
    image = _load(content, max_pixels)
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError('has values of more than 16 bits')
        return np.round(values / 257).astype(np.uint8)[..., None]
    if image.mode == 'F':
        raise ValueError('has floating-point values, whose range is unknown')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    elif image.mode not in ('L', 'RGB'):
        image = image.convert('L' if image.mode == '1' else 'RGB')
    pixels = np.asarray(image)
    return pixels if image.mode == 'RGB' else pixels[..., None]


def most_bytes(pixels: int) -> int:
    """Return how many bytes a picture file may have: its uncompressed pixels, and 1 MiB for all else."""
    return BYTES_PER_PIXEL * pixels + 2**20


def is_picture(file: IO[bytes]) -> bool:
    """Return whether an open file starts with the header of a picture."""
    try:
        with _open(file):
            return True
    except Exception:  # as in `_load`
        return False


def pixels(start: bytes) -> int | None:
    """Return the number of pixels that the start of a picture file announces; None if that needs the whole file."""
    try:
        with _open(io.BytesIO(start)) as image:
            return image.width * image.height
    except PIL.UnidentifiedImageError:
        return 0
    except Exception:  # as in `_load`
        return None


def _load(content: bytes, max_pixels: int) -> Image.Image:
    """Decode with Pillow, upright."""
    try:
        with _open(io.BytesIO(content)) as image:
            (width, height), too_large = image.size, image.width * image.height > max_pixels
            if not too_large:
                image.load()
                return _upright(image)
    except PIL.UnidentifiedImageError as error:
        raise ValueError('is not a picture in a known format' if content else 'is empty') from error
    except Exception as error:  # Pillow's decoders raise exceptions of many types for damaged files
        raise ValueError(f'cannot be decoded ({type(error).__name__}: {str(error)[:200]})') from error
    raise ValueError(
        f'is {width}×{height}, which is more than {max_pixels:,} pixels: if that is its true size, reduce the picture, '
        f'or allow it by --config.data.max_pixels={width * height}'
    )


def _open(file: IO[bytes]) -> ImageFile.ImageFile:
    """Read the header, as Image.open does, but in FORMATS alone and without a limit on the size.

    Raises:
        Exception: of many types; UnidentifiedImageError if it is in none of FORMATS.
    """
    prefix = file.read(16)
    for factory, accept in _readers(tuple(FORMATS)):
        if accept(prefix) is True:
            file.seek(0)
            try:
                return factory(file, '')
            except (SyntaxError, IndexError, TypeError, struct.error):  # of another format, as Image.open has it
                continue
    raise PIL.UnidentifiedImageError


@functools.cache
def _readers(names: tuple[str, ...]) -> list[tuple[Callable, Callable]]:
    """Return Pillow's (reader, test of the first 16 bytes) for each format; older versions lack some."""
    Image.init()
    readers = [Image.OPEN[name] for name in names if name in Image.OPEN]
    return [(factory, accept) for factory, accept in readers if accept]


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data; the pixels are still valid
        return image.copy()
