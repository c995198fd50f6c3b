"""Decoding and preprocessing: pictures whose pixels encode their positions, and files of all kinds."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.pictures import CROPS, Preprocessing, decode
from tests.galleries import encoded, noise


def places(height, width):
    """Return a picture with the pixels (row, column, 7)."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


@pytest.mark.parametrize(
    ('crop', 'shape', 'size', 'top', 'left'),
    [
        ('ddim', (218, 178), 128, 57, 25),  # rows 57 … 184, columns 25 … 152
        ('center_140', (218, 178), 140, 39, 19),  # rows 39 … 178, columns 19 … 158
        ('center', (20, 33), 20, 0, 6),
        ('center', (40, 21), 21, 9, 0),
        ('', (30, 30), 30, 0, 0),
    ],
)
def test_a_crop_takes_these_rows_and_columns(crop, shape, size, top, left):
    """The numbers are those of the authors' code (FIELD.md 2.14)."""
    picture = places(*shape)
    image = Preprocessing(crop, size, 3)(decode(encoded(picture)))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, picture[top : top + size, left : left + size])


@pytest.mark.parametrize(
    ('crop', 'shape', 'size', 'top', 'left', 'factor'),
    [
        ('ddim', (218, 178), 64, 57, 25, 2),
        ('center_140', (218, 178), 70, 39, 19, 2),
        ('center', (80, 100), 40, 0, 10, 2),
        ('center', (90, 60), 20, 15, 0, 3),
        ('', (128, 128), 32, 0, 0, 4),
    ],
)
def test_a_resized_pixel_is_the_center_of_those_it_covers(crop, shape, size, top, left, factor):
    """A symmetric filter preserves a linear slope: pixel i covers factor·i … factor·(i+1) − 1. Not at the borders,
    where the filter is cut off."""
    image = Preprocessing(crop, size, 3)(places(*shape)).astype(float)
    center = factor * np.arange(size) + (factor - 1) / 2
    inner = slice(3, -3)
    np.testing.assert_allclose(image[inner, inner, 0], np.tile(top + center[inner, None], size - 6), atol=0.51)
    np.testing.assert_allclose(image[inner, inner, 1], np.tile(left + center[inner], (size - 6, 1)), atol=0.51)
    assert (image[..., 2] == 7).all()


def test_a_central_crop_equals_resizing_the_shorter_side_first():
    """Except at the new borders."""
    smooth = Image.fromarray(noise(1, 12, 18, 3)[0]).resize((180, 120), Image.Resampling.BICUBIC)
    resized = np.asarray(smooth.resize((60, 40), Image.Resampling.LANCZOS))[:, 10:50]
    image = Preprocessing('center', 40, 3)(np.asarray(smooth))
    assert np.ptp(image) > 150
    np.testing.assert_allclose(image[:, 3:-3].astype(int), resized[:, 3:-3], atol=2)


@pytest.mark.parametrize(
    ('crop', 'shape', 'size'),
    [('', (60, 60), 12), ('center', (80, 60), 12), ('center_140', (218, 178), 28), ('ddim', (218, 178), 18)],
)
def test_a_checkerboard_becomes_flat(crop, shape, size):
    """Without antialiasing, every fifth or seventh pixel of it is a checkerboard again."""
    board = (np.indices(shape).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    image = Preprocessing(crop, size, 1)(board)[1:-1, 1:-1]
    assert np.abs(image - 127.5).max() < 12
    assert abs(image.mean() - 127.5) < 1.5


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 255), st.sampled_from([1, 3]))
def test_a_uniform_colour_is_preserved_at_any_size(height, width, size, level, channels):
    picture = np.full((height, width, 1), level, np.uint8)
    preprocess = Preprocessing('center', size, channels)
    if size > min(height, width):
        with pytest.raises(ValueError, match=f'{width}×{height}.*image_size={size}'):
            preprocess(picture)
    else:
        np.testing.assert_array_equal(preprocess(picture), np.full((size, size, channels), level))


def test_grey_of_colour_is_the_luma_and_colour_of_grey_is_grey():
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    colour, grey = noise(1, 16, 16, 3)[0], noise(1, 16, 16, 1)[0]
    luma = Preprocessing('', 16, 1)(colour)
    assert luma.shape == (16, 16, 1)
    np.testing.assert_allclose(luma[..., 0], colour @ [0.299, 0.587, 0.114], atol=0.6)
    np.testing.assert_array_equal(Preprocessing('', 16, 3)(grey), np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(Preprocessing('', 16, 1)(grey), grey)


# Formats.


@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_sixteen_bits_are_rounded_to_eight(kind):
    """0 and 65,535 become 0 and 255; no value in between is truncated or overflows."""
    values = np.concatenate([np.arange(256) * 257, np.random.default_rng(0).integers(0, 65536, 256)])
    values = values.reshape(16, 32, 1).astype(np.uint16)
    picture = decode(encoded(values, kind))
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, np.round(values / 65535 * 255))


def test_more_than_sixteen_bits_are_an_error():
    with pytest.raises(ValueError, match='16 bits'):
        decode(encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), 'tiff'))


def test_palettes_are_applied():
    image = Image.new('P', (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 0, 1, 2, 3])
    image.putdata([0, 1, 2, 1])
    expected = [[[10, 20, 30], [200, 100, 0]], [[1, 2, 3], [200, 100, 0]]]
    np.testing.assert_array_equal(decode(encoded(image)), expected)
    picture = decode(encoded(image, transparency=1))  # colour 1 is transparent
    np.testing.assert_array_equal(picture, np.where(np.array(expected) == [200, 100, 0], 255, expected))
    picture = decode(encoded(image, transparency=bytes([255, 51, 255])))  # a fifth of colour 1 is visible
    np.testing.assert_allclose(picture[0, 1], 255 - (255 - np.array([200, 100, 0])) / 5, atol=1)


def test_cmyk_is_converted_to_rgb():
    for ink in [(0, 0, 0, 0), (255, 0, 0, 0), (40, 80, 120, 0), (0, 0, 0, 255), (100, 10, 60, 128)]:
        picture = decode(encoded(Image.new('CMYK', (16, 16), ink), 'jpeg', quality=95))
        cyan_to_yellow, black = np.array(ink[:3]), ink[3]
        np.testing.assert_allclose(picture[8, 8], (255 - cyan_to_yellow) * (255 - black) / 255, atol=4)


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparent_pixels_are_blended_with_white(mode):
    drawn = noise(1, 16, 16, len(mode))[0]
    drawn[0, :8, -1], drawn[0, 8:, -1] = 0, 255
    picture = decode(encoded(drawn))
    alpha = drawn[..., -1:] / 255
    over_white = alpha * drawn[..., :-1] + (1 - alpha) * 255
    assert picture.shape == (16, 16, 3)
    np.testing.assert_allclose(picture, np.broadcast_to(over_white, picture.shape), atol=1)
    assert (picture[0, :8] == 255).all()
    np.testing.assert_array_equal(picture[0, 8:], np.broadcast_to(drawn[0, 8:, :-1], (8, 3)))


def test_one_bit_is_black_or_white():
    bits = noise(1, 9, 9)[0] > 127
    np.testing.assert_array_equal(decode(encoded(bits))[..., 0], bits * np.uint8(255))


# The EXIF standard defines where the stored rows and columns lie; these undo it.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize('orientation', UPRIGHT)
def test_the_exif_orientation_is_applied(orientation):
    stored = places(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(stored, exif=exif)), UPRIGHT[orientation](stored))


def test_damaged_exif_data_are_ignored():
    stored = places(6, 9)
    for exif in (b'Exif\0\0', b'Exif\0\0MM\0*\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', b'\0' * 40):
        np.testing.assert_array_equal(decode(encoded(stored, exif=exif)), stored)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new('L', (8, 8), level) for level in (50, 200, 0)]
    content = encoded(frames[0], 'gif', save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as animation:
        assert animation.n_frames == 3
    assert (decode(content) == 50).all()


def test_floating_point_values_are_an_error():
    with pytest.raises(ValueError, match='floating-point'):
        decode(encoded(np.ones((4, 4), np.float32), 'tiff'))


# Damaged files.


@settings(max_examples=30)
@given(st.sampled_from(['jpeg', 'png', 'webp', 'bmp']), st.floats(0, 0.97))
def test_truncated_files_are_errors(kind, share):
    """The rest is not filled with grey, as by some readers."""
    content = encoded(noise(1, 40, 40, 3)[0], kind)
    with pytest.raises(ValueError, match=r'is empty|is not a picture|cannot be decoded'):
        decode(content[: int(share * len(content))])


@settings(max_examples=60)
@given(st.sampled_from(['jpeg', 'png', 'gif', 'tiff', 'webp', 'bmp', 'ppm']), st.data())
def test_a_damaged_file_is_a_picture_or_a_value_error(kind, draw):
    """Whatever exception a decoder raises."""
    content = bytearray(encoded(noise(1, 12, 12, 3)[0], kind))
    for place in draw.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = draw.draw(st.integers(0, 255))
    try:
        picture = decode(bytes(content))
    except ValueError as error:
        assert str(error)
    else:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] in (1, 3)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'is empty'),
        (b'not a picture\n' * 9, 'is not a picture in a known format'),
        (b'\xff\xd8\xff', 'is not a picture'),
    ],
)
def test_other_files_are_errors(content, words):
    with pytest.raises(ValueError, match=words):
        decode(content)


@pytest.mark.parametrize('filters', ['error', 'ignore'])
@pytest.mark.parametrize('side', [10_000, 20_000])
def test_a_decompression_bomb_is_not_decoded(side, filters):
    """Pillow only warns of the smaller one, whose 100 million pixels take 100 bytes. The process's warning filters do
    not matter."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(
            ValueError, match=rf'{side}×{side}, .* more than 89,478,485 pixels.*--config.data.max_pixels={side**2}'
        ):
            decode(bomb)


def test_the_largest_number_of_pixels_is_allowed():
    picture = places(5, 20)
    np.testing.assert_array_equal(decode(encoded(picture), max_pixels=100), picture)
    with pytest.raises(ValueError, match='more than 99 pixels'):
        decode(encoded(picture), max_pixels=99)


@pytest.mark.filterwarnings('error')
def test_a_larger_picture_than_pillow_allows_can_be_allowed(monkeypatch):
    """Pillow warns of, or refuses, more pixels than its own limit, wherever it looks."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
    picture = places(10, 20)
    preprocess = Preprocessing('center', 10, 3)
    np.testing.assert_array_equal(preprocess(decode(encoded(picture))), picture[:, 5:15])


def test_only_formats_that_are_decoded_within_the_process_are_opened():
    """Pillow recognizes EPS by its content, whatever its name, and would start Ghostscript."""
    postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n'
    with Image.open(io.BytesIO(postscript)) as image:
        assert image.format == 'EPS'
    with pytest.raises(ValueError, match='not a picture in a known format'):
        decode(postscript)


# What cannot be preprocessed.


@pytest.mark.parametrize(
    ('crop', 'shape', 'size', 'words'),
    [
        ('', (9, 8), 8, '8×9.*not square.*data.crop=center'),
        ('', (8, 8), 16, '8×8.*image_size=16'),
        ('center', (100, 7), 8, '7×100.*image_size=8'),
        ('ddim', (184, 178), 64, '178×184.*too small for data.crop=ddim'),
        ('center_140', (139, 178), 64, '178×139.*too small for data.crop=center_140'),
        ('ddim', (218, 178), 129, '178×218.*image_size=129'),
    ],
)
def test_pictures_of_an_unsuitable_size_are_errors(crop, shape, size, words):
    with pytest.raises(ValueError, match=words):
        Preprocessing(crop, size, 3)(np.zeros((*shape, 1), np.uint8))


@pytest.mark.parametrize(
    'array', [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_arrays_that_are_not_pictures_are_errors(array):
    """A user's source may return them."""
    with pytest.raises(ValueError, match=rf'{array.dtype} .*must be of uint8 \(H, W, 1 or 3\)'):
        Preprocessing('', 8, 3)(array)


def test_invalid_parameters_are_named():
    for parameters, words in [
        (('centre', 8, 3), "'centre'.*'center'"),
        (('', 0, 3), 'image_size is 0'),
        (('', 8, 2), 'channels is 2'),
    ]:
        with pytest.raises(ValueError, match=words):
            Preprocessing(*parameters)


def test_the_fingerprint_depends_on_everything_that_determines_the_pixels(monkeypatch):
    def found():
        return [
            Preprocessing(crop, size, channels).fingerprint()
            for crop in CROPS
            for size in (8, 16)
            for channels in (1, 3)
        ]

    first = found()
    assert first == found()
    assert len(set(first)) == len(CROPS) * 4
    monkeypatch.setattr(PIL, '__version__', '0.0.1')
    assert not set(found()) & set(first)
