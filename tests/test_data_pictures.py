"""From the bytes of a picture to what a network sees: pixels that tell where they were, and all kinds of files."""

import io
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.pictures import CROPS, Preprocessing, decode
from tests.galleries import encoded, noise

ROOT = pathlib.Path(__file__).parent.parent


def places(height, width):
    """A picture whose pixels are (row, column, 7)."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


def pixels(content):
    return np.asarray(decode(content))


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
    """The numbers are those of the authors' own code (FIELD.md 2.14)."""
    picture = places(*shape)
    seen = Preprocessing(crop, size, 3)(encoded(picture))
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, picture[top : top + size, left : left + size])


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
def test_a_resized_pixel_is_the_middle_of_those_it_covers(crop, shape, size, top, left, factor):
    """A slope stays one, under any symmetric filter: pixel i covers factor·i … factor·(i+1) − 1. Not at the borders,
    where what a filter would reach for is missing."""
    seen = Preprocessing(crop, size, 3)(encoded(places(*shape))).astype(float)
    middle = factor * np.arange(size) + (factor - 1) / 2
    inner = slice(3, -3)
    np.testing.assert_allclose(seen[inner, inner, 0], np.tile(top + middle[inner, None], size - 6), atol=0.51)
    np.testing.assert_allclose(seen[inner, inner, 1], np.tile(left + middle[inner], (size - 6, 1)), atol=0.51)
    assert (seen[..., 2] == 7).all()


def test_a_central_square_is_the_shorter_side_resized():
    """To cut and to resize is to resize the shorter side and to cut, but for the borders that the cut makes."""
    smooth = Image.fromarray(noise(1, 12, 18, 3)[0]).resize((180, 120), Image.Resampling.BICUBIC)
    resized = np.asarray(smooth.resize((60, 40), Image.Resampling.LANCZOS))[:, 10:50]
    seen = Preprocessing('center', 40, 3)(encoded(smooth))
    assert np.ptp(seen) > 150
    np.testing.assert_allclose(seen[:, 3:-3].astype(int), resized[:, 3:-3], atol=2)


@pytest.mark.parametrize(
    ('crop', 'shape', 'size'),
    [('', (60, 60), 12), ('center', (80, 60), 12), ('center_140', (218, 178), 28), ('ddim', (218, 178), 18)],
)
def test_a_checkerboard_becomes_flat(crop, shape, size):
    """Without antialiasing, every fifth or seventh pixel of it is a checkerboard again."""
    board = (np.indices(shape).sum(0) % 2 * 255).astype(np.uint8)
    seen = Preprocessing(crop, size, 1)(encoded(board))[1:-1, 1:-1]
    assert np.abs(seen - 127.5).max() < 12
    assert abs(seen.mean() - 127.5) < 1.5


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 255), st.sampled_from([1, 3]))
def test_one_colour_stays_one_colour_at_any_size(height, width, size, level, channels):
    picture = encoded(np.full((height, width), level, np.uint8))
    preprocess = Preprocessing('center', size, channels)
    if size > min(height, width):
        with pytest.raises(ValueError, match=f'{width}×{height}.*image_size={size}'):
            preprocess(picture)
    else:
        np.testing.assert_array_equal(preprocess(picture), np.full((size, size, channels), level))


def test_grey_of_colour_is_its_luma_and_colour_of_grey_is_grey():
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    colour = noise(1, 16, 16, 3)[0]
    seen = Preprocessing('', 16, 1)(encoded(colour))
    assert seen.shape == (16, 16, 1)
    np.testing.assert_allclose(seen[..., 0], colour @ [0.299, 0.587, 0.114], atol=0.6)
    grey = noise(1, 16, 16)[0]
    np.testing.assert_array_equal(Preprocessing('', 16, 3)(encoded(grey)), np.repeat(grey[..., None], 3, axis=-1))
    np.testing.assert_array_equal(Preprocessing('', 16, 1)(encoded(grey))[..., 0], grey)


@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_sixteen_bits_are_rounded_to_eight(kind):
    """0 and 65,535 are 0 and 255, and nothing in between is cut off or overflows."""
    values = np.concatenate([np.arange(256) * 257, np.random.default_rng(0).integers(0, 65536, 256)])
    values = values.reshape(16, 32).astype(np.uint16)
    seen = pixels(encoded(Image.fromarray(values), kind))
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, np.round(values / 65535 * 255))


def test_more_than_sixteen_bits_are_refused():
    with pytest.raises(ValueError, match='16 bits'):
        decode(encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), 'tiff'))


def test_a_palette_is_looked_up():
    image = Image.new('P', (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 0, 1, 2, 3])
    image.putdata([0, 1, 2, 1])
    expected = [[[10, 20, 30], [200, 100, 0]], [[1, 2, 3], [200, 100, 0]]]
    np.testing.assert_array_equal(pixels(encoded(image)), expected)
    seen = pixels(encoded(image, transparency=1))  # colour 1 is transparent
    np.testing.assert_array_equal(seen, np.where(np.array(expected) == [200, 100, 0], 255, expected))
    seen = pixels(encoded(image, transparency=bytes([255, 51, 255])))  # and here a fifth of it is seen
    np.testing.assert_allclose(seen[0, 1], 255 - (255 - np.array([200, 100, 0])) / 5, atol=1)


def test_ink_is_turned_to_light():
    for ink in [(0, 0, 0, 0), (255, 0, 0, 0), (40, 80, 120, 0), (0, 0, 0, 255), (100, 10, 60, 128)]:
        seen = pixels(encoded(Image.new('CMYK', (16, 16), ink), 'jpeg', quality=95))
        cyan_to_yellow, black = np.array(ink[:3]), ink[3]
        np.testing.assert_allclose(seen[8, 8], (255 - cyan_to_yellow) * (255 - black) / 255, atol=4)


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_what_is_transparent_is_seen_over_white(mode):
    drawn = noise(1, 16, 16, len(mode))[0]
    drawn[0, :8, -1], drawn[0, 8:, -1] = 0, 255
    seen = pixels(encoded(Image.fromarray(drawn)))
    alpha = drawn[..., -1:] / 255
    over_white = alpha * drawn[..., :-1] + (1 - alpha) * 255
    assert seen.shape == (16, 16, 3)
    np.testing.assert_allclose(seen, np.broadcast_to(over_white, seen.shape), atol=1)
    assert (seen[0, :8] == 255).all()
    np.testing.assert_array_equal(seen[0, 8:], np.broadcast_to(drawn[0, 8:, :-1], (8, 3)))


def test_one_bit_is_black_or_white():
    bits = noise(1, 9, 9)[0] > 127
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits))), bits * np.uint8(255))


# What the EXIF standard says that the stored rows and columns are, undone.
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
def test_a_camera_held_askew_is_turned_upright(orientation):
    stored = places(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(stored, exif=exif)), UPRIGHT[orientation](stored))


def test_damaged_exif_does_not_cost_the_picture():
    stored = places(6, 9)
    for exif in (b'Exif\0\0', b'Exif\0\0MM\0*\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', b'\0' * 40):
        np.testing.assert_array_equal(pixels(encoded(stored, exif=exif)), stored)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new('L', (8, 8), level) for level in (50, 200, 0)]
    content = encoded(frames[0], 'gif', save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as animation:
        assert animation.n_frames == 3
    assert (pixels(content) == 50).all()


def test_floats_are_refused():
    with pytest.raises(ValueError, match='floating-point'):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), 'tiff'))


@settings(max_examples=30)
@given(st.sampled_from(['jpeg', 'png', 'webp', 'bmp']), st.floats(0, 0.97))
def test_what_is_cut_off_is_refused(kind, share):
    """Not filled up with grey, as some readers do."""
    content = encoded(noise(1, 40, 40, 3)[0], kind)
    with pytest.raises(ValueError, match=r'is empty|no picture|cannot be decoded'):
        decode(content[: int(share * len(content))])


@settings(max_examples=60)
@given(st.sampled_from(['jpeg', 'png', 'gif', 'tiff', 'webp', 'bmp', 'ppm']), st.data())
def test_damage_is_a_picture_or_a_value_error(kind, draw):
    """Whatever a decoder raises."""
    content = bytearray(encoded(noise(1, 12, 12, 3)[0], kind))
    for place in draw.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = draw.draw(st.integers(0, 255))
    try:
        assert decode(bytes(content)).mode in ('L', 'RGB')
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'is empty'),
        (b'not a picture\n' * 9, 'no picture of a known format'),
        (b'\xff\xd8\xff', 'no picture'),
    ],
)
def test_what_is_no_picture_is_refused(content, words):
    with pytest.raises(ValueError, match=words):
        decode(content)


def test_a_bomb_is_not_unpacked(tmp_path):
    """100 million pixels in 100 bytes, of which Pillow by itself would only warn."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', 10_000, 10_000, 8, 0, 0, 0, 0)
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    (tmp_path / 'bomb.png').write_bytes(bomb)
    code = 'import sys; from diffusion.data.pictures import decode; decode(open(sys.argv[1], "rb").read())'
    done = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'bomb.png'], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('ValueError: cannot be decoded (DecompressionBombWarning')


@pytest.mark.parametrize(
    ('crop', 'shape', 'size', 'words'),
    [
        ('', (9, 8), 8, '8×9.*no square.*data.crop=center'),
        ('', (8, 8), 16, '8×8.*image_size=16'),
        ('center', (100, 7), 8, '7×100.*image_size=8'),
        ('ddim', (184, 178), 64, '178×184.*too small for data.crop=ddim'),
        ('center_140', (139, 178), 64, '178×139.*too small for data.crop=center_140'),
        ('ddim', (218, 178), 129, '178×218.*image_size=129'),
    ],
)
def test_what_does_not_fit_is_refused_with_its_size(crop, shape, size, words):
    with pytest.raises(ValueError, match=words):
        Preprocessing(crop, size, 3)(encoded(np.zeros(shape, np.uint8)))


def test_wrong_parameters_are_named():
    for parameters, words in [
        (('centre', 8, 3), "'centre'.*'center'"),
        (('', 0, 3), 'image_size is 0'),
        (('', 8, 2), 'channels is 2'),
    ]:
        with pytest.raises(ValueError, match=words):
            Preprocessing(*parameters)


def test_the_fingerprint_tells_all_that_the_pixels_depend_on(monkeypatch):
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
