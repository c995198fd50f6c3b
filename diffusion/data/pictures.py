"""Decode and preprocess pictures: from the bytes of a file to the uint8 image that a network is trained on."""

import contextlib
import dataclasses
import functools
import io
import struct
import sys
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps
from PIL.Image import Resampling

from diffusion.data.budget import Budget
from diffusion.util import json_sha256

MAX_PIXELS = 89_478_485  # Pillow warns above this number
BYTES_PER_PIXEL = 8  # at most, uncompressed: 4 channels of 16 bits
DECODING_BYTES_PER_PIXEL = 16  # at most, in memory, as measured; twice as many for colours of 16 bits
memory = Budget(4 * 2**30)  # bytes; what all threads together take while they decode

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

BITS, PHOTOMETRIC, PLANES = 258, 262, 284  # tags of TIFF files

# Pillow reads only the high byte of each value of a colour of 16 bits. The low bytes are read by the raw mode of the
# other byte order, which this table has for each raw mode. For LA;16B, it has a raw mode that reads all bytes.
OTHER_BYTES = {
    f'{mode};16{order}': f'{mode};16{other}'
    for mode in ('RGB', 'RGBA', 'RGBX')
    for order, other in (('B', 'L'), ('L', 'B'), ('N', 'B' if sys.byteorder == 'little' else 'L'))
} | {'LA;16B': 'RGBA'}


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

    The EXIF orientation is applied. An animation gives its first frame. 16 bits are rounded to 8; only CMYK,
    premultiplied colours, and colours in JPEG 2000 and SGI files lose their lower bits. Transparent pixels are blended
    with white. Palettes and CMYK are converted to RGB. Colour profiles are ignored. A thread waits while the pictures
    that others are decoding leave too little of `memory`.

    Args:
        content: the whole file, in one of FORMATS, whatever its name.
        max_pixels: a picture with more pixels is not decoded.

    Returns:
        The picture, (H, W, 1) in grey or (H, W, 3) in RGB, values in 0 … 255.

    Raises:
        ValueError: the content is not a picture, is damaged, has too many pixels, or values whose range is unknown. The
            message is a predicate, such as 'is empty'; the caller puts the picture's name before it.
    """
    with _header(content) as image:
        count = image.width * image.height
        if count > max_pixels:
            raise ValueError(
                f'is {image.width}×{image.height}, which is more than {max_pixels:,} pixels: if that is its true size, '
                f'reduce the picture, or allow it by --config.data.max_pixels={count}'
            )
        times = 2 if _raw_mode(image) in OTHER_BYTES else 1
        with memory.taking(times * DECODING_BYTES_PER_PIXEL * count):
            return _eight_bits(image, content)


def _eight_bits(image: ImageFile.ImageFile, content: bytes) -> UInt8[np.ndarray, 'H W C']:
    """Decode an image whose header is read, and convert it to grey or RGB."""
    kind, raw_mode, tags = image.format, _raw_mode(image), getattr(image, 'tag_v2', {})
    if image.mode == 'F':
        raise ValueError('has floating-point values, whose range is unknown')
    if image.mode == 'I' and kind == 'TIFF':
        raise ValueError('has values of 32 bits or with a sign, whose range is unknown: save it with 8 or 16 bits')
    if tags.get(PLANES) == 2 and 16 in tags.get(BITS, ()) and not image.mode.startswith('I'):
        raise ValueError('has colours of 16 bits in planes, which Pillow misreads: save it with interleaved colours')
    picture = _load(image)
    transparent = picture.info.get('transparency')
    if picture.mode.startswith('I'):
        most = 4095 if raw_mode == 'I;12' else 65535
        values = np.asarray(picture)
        if picture.mode == 'I' and (values.min() < 0 or values.max() > most):  # of a format that a config has added
            raise ValueError(f'has values from {values.min()} to {values.max()}, but 0 … {most} was expected')
        if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow ignores for 16 bits
            values = most - values
        levels = np.round(values / np.float32(most / 255)).astype(np.uint8)
        if transparent is not None:
            levels[values == transparent] = 255
        return levels[..., None]
    if raw_mode in OTHER_BYTES:
        high, low = np.asarray(picture), np.asarray(_load_again(content, OTHER_BYTES[raw_mode]))
        if raw_mode == 'LA;16B':
            high, low = low[..., ::2], low[..., 1::2]
        picture = _rounded(high, low, transparent)
    elif raw_mode in ('L;2', 'L;4') and transparent is not None:  # Pillow spreads the other levels over 0 … 255
        picture.info['transparency'] = transparent * (85 if raw_mode == 'L;2' else 17)
    if picture.mode == 'La':
        picture = picture.convert('LA')
    if picture.has_transparency_data:
        picture = picture if picture.mode == 'RGBA' else picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture).convert('RGB')
    elif picture.mode not in ('L', 'RGB'):
        picture = picture.convert('L' if picture.mode == '1' else 'RGB')
    array = np.asarray(picture)
    return array if picture.mode == 'RGB' else array[..., None]


def _rounded(
    high: UInt8[np.ndarray, 'H W C'], low: UInt8[np.ndarray, 'H W C'], transparent: tuple[int, ...] | None
) -> Image.Image:
    """Round 16 bits to 8: (256·high + low)/257 = high + (low − high)/257. `transparent` is a colour of 16 bits."""
    levels = np.empty_like(high)
    for row in range(len(high)):  # so that temporary arrays are small
        difference = low[row].astype(np.int16) - high[row]
        levels[row] = high[row] + (difference > 128) - (difference < -128)
    image = Image.fromarray(levels)
    if transparent is not None:
        there = [(high[..., i] == level >> 8) & (low[..., i] == level & 255) for i, level in enumerate(transparent)]
        image.putalpha(Image.fromarray(np.where(np.all(there, axis=0), 0, 255).astype(np.uint8)))
    return image


def most_bytes(pixels: int) -> int:
    """Return how many bytes a picture file may have: its uncompressed pixels, and 1 MiB for all else."""
    return BYTES_PER_PIXEL * pixels + 2**20


def is_picture(file: IO[bytes]) -> bool:
    """Return whether an open file starts with the header of a picture."""
    try:
        with _open(file):
            return True
    except Exception:  # as in `_header`
        return False


def pixels(start: bytes) -> int | None:
    """Return the number of pixels that the start of a picture file announces; None if that needs the whole file."""
    try:
        with _open(io.BytesIO(start)) as image:
            return image.width * image.height
    except PIL.UnidentifiedImageError:
        return 0
    except Exception:  # as in `_header`
        return None


def _header(content: bytes) -> ImageFile.ImageFile:
    """Read the header of a picture file."""
    try:
        return _open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:
        raise ValueError('is not a picture in a known format' if content else 'is empty') from error
    except Exception as error:  # Pillow's decoders raise exceptions of many types for damaged files
        raise _damaged(error) from error


def _load(image: ImageFile.ImageFile) -> Image.Image:
    """Decode with Pillow, upright."""
    try:
        image.load()
        return _upright(image)
    except Exception as error:  # as in `_header`
        raise _damaged(error) from error


def _load_again(content: bytes, raw_mode: str) -> Image.Image:
    """Decode the same bytes as pixels of another raw mode."""
    with _header(content) as image:
        image.tile = [
            tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
            for tile in image.tile
        ]
        return _load(image)


def _damaged(error: Exception) -> ValueError:
    return ValueError(f'cannot be decoded ({type(error).__name__}: {str(error)[:200]})')


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


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name for how the pixels are stored, such as 'RGB;16B'; '' if there is none."""
    for tile in image.tile[:1]:
        name = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
        if isinstance(name, str):
            return name
    return ''


@functools.cache
def _readers(names: tuple[str, ...]) -> list[tuple[Callable, Callable]]:
    """Return Pillow's (reader, test of the first 16 bytes) for each format; older versions lack some."""
    Image.init()
    readers = [Image.OPEN[name] for name in names if name in Image.OPEN]
    return [(factory, accept) for factory, accept in readers if accept]


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, in place."""
    with contextlib.suppress(Exception):  # damaged EXIF data; the pixels are still valid
        ImageOps.exif_transpose(image, in_place=True)
    return image
