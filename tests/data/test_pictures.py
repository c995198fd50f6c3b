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

from diffusion.data import pictures
from diffusion.data.pictures import CROPS, Preprocessing, decode
from tests.galleries import encoded, noise


def places(height, width):
    """Return a picture with the pixels (row, column, 7)."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


def chunk(kind, content):
    """Return a chunk of a PNG file."""
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(values, bits, colour_type, *extra):
    """Write (H, W, channels) as the PNG specification says; `extra` are chunks. Pillow writes no colours of 16 bits."""
    height, width = values.shape[:2]
    every_bit = np.unpackbits(values.astype('>u2')[..., None].view(np.uint8), axis=-1).reshape(*values.shape, 16)
    rows = np.packbits(every_bit[..., 16 - bits :].reshape(height, -1), axis=-1)
    header = struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
    chunks = [chunk(b'IHDR', header), *extra, chunk(b'IDAT', data), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def tiff(strips, height, width, tags, order='<'):
    """Write strips of bytes as the TIFF 6.0 specification says; `tags` are short numbers or tuples of them."""
    tags = {256: width, 257: height, 259: 1, 278: height} | tags
    fields = {tag: (3, 'H', value if isinstance(value, tuple) else (value,)) for tag, value in tags.items()}
    fields[273] = fields[279] = (4, 'I', (0,) * len(strips))  # for the sizes; their values follow
    place = 8 + 2 + 12 * len(fields) + 4
    outside = {tag: struct.calcsize(order + len(values) * code) for tag, (_, code, values) in fields.items()}
    start = place + sum(size for size in outside.values() if size > 4)
    fields[273] = (4, 'I', tuple(start + sum(map(len, strips[:i])) for i in range(len(strips))))
    fields[279] = (4, 'I', tuple(map(len, strips)))
    directory = long = b''
    for tag, (kind, code, values) in sorted(fields.items()):
        content = struct.pack(order + len(values) * code, *values)
        if len(content) > 4:
            content, long = struct.pack(order + 'I', place + len(long)), long + content
        directory += struct.pack(order + 'HHI', tag, kind, len(values)) + content.ljust(4, b'\0')
    head = (b'II' if order == '<' else b'MM') + struct.pack(order + 'HIH', 42, 8, len(fields))
    return head + directory + b'\0' * 4 + long + b''.join(strips)


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


# Values that rounding and truncation tell apart, and the ends.
COLOURS = np.random.default_rng(0).integers(0, 65536, (5, 7, 4))
COLOURS[0, :5] = np.array([0, 129, 257 * 128 + 128, 257 * 128 + 129, 65535])[:, None]


@pytest.mark.parametrize('channels', [3, 4])
@pytest.mark.parametrize('kind', ['png', 'tiff <', 'tiff >', 'tiff compressed'])
def test_colours_of_sixteen_bits_are_rounded_to_eight(kind, channels):
    """Pillow itself cuts them off."""
    colours = COLOURS[..., :channels].copy()
    colours[..., 3:] = 65535  # opaque
    if kind == 'png':
        content = png(colours, 16, 2 if channels == 3 else 6)
    else:
        order, compressed = kind[-1] if kind[-1] in '<>' else '<', kind.endswith('compressed')
        strip = colours.astype(order + 'u2').tobytes()
        tags = {258: (16,) * channels, 259: 8 if compressed else 1, 262: 2, 277: channels}
        content = tiff(
            [zlib.compress(strip) if compressed else strip], 5, 7, tags | ({338: 2} if channels == 4 else {}), order
        )
    np.testing.assert_array_equal(decode(content), np.round(colours[..., :3] / 257))


def test_grey_with_alpha_of_sixteen_bits_is_rounded_to_eight():
    """The colour over white is a α + 1 − α, in units of 65,535."""
    colours = COLOURS[..., :2].copy()
    colours[1:, :, 1] = 65535
    picture = decode(png(colours, 16, 4))
    np.testing.assert_array_equal(picture[1:], np.repeat(np.round(colours[1:, :, :1] / 257), 3, axis=-1))
    grey, alpha = colours[0, :, :1] / 65535, colours[0, :, 1:] / 65535
    np.testing.assert_allclose(picture[0], np.repeat(255 * (grey * alpha + 1 - alpha), 3, axis=-1), atol=1)


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_one_grey_level_can_be_transparent(bits):
    """The PNG specification gives it in the units of the file, not of 0 … 255."""
    levels = np.arange(min(2**bits, 1000)).reshape(1, -1, 1) * (65 if bits == 16 else 1)
    most, transparent = 2**bits - 1, int(levels[0, levels.size // 3, 0])
    content = png(levels, bits, 0, chunk(b'tRNS', struct.pack('>H', transparent)))
    expected = np.where(levels == transparent, 255, np.round(levels / most * 255))
    np.testing.assert_array_equal(decode(content), np.broadcast_to(expected, decode(content).shape))


@pytest.mark.parametrize('bits', [8, 16])
def test_one_colour_can_be_transparent(bits):
    """One that differs from it in a single bit cannot."""
    colours = COLOURS[..., :3] >> (16 - bits)
    colours[1, 1] = colours[3, 3] ^ [0, 1, 0]
    content = png(colours, bits, 2, chunk(b'tRNS', struct.pack('>HHH', *colours[3, 3])))
    expected = np.round(colours / (2**bits - 1) * 255)
    expected[3, 3] = 255
    np.testing.assert_array_equal(decode(content), expected)


@pytest.mark.parametrize('bits', [8, 12, 16])
@pytest.mark.parametrize('photometric', [0, 1])
def test_tiff_greys_are_spread_over_all_levels(bits, photometric):
    """TIFF 6.0: with PhotometricInterpretation 0, white is zero. 2^bits − 1 is the other end of the range."""
    if (bits, photometric) == (12, 0):
        return  # Pillow refuses it
    values = np.linspace(0, 2**bits - 1, 6).round().astype(int)
    if bits == 12:
        text = ''.join(f'{value:012b}' for value in values)
        strip = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    else:
        strip = values.astype(f'<u{bits // 8}').tobytes()
    picture = decode(tiff([strip], 1, 6, {258: bits, 262: photometric, 277: 1}))
    grey = values / (2**bits - 1)
    np.testing.assert_array_equal(picture[0, :, 0], np.round(255 * (grey if photometric else 1 - grey)))


def test_grey_premultiplied_by_alpha_is_blended_with_white():
    strip = bytes([0, 0, 100, 200, 50, 255])  # grey·α and α
    try:
        picture = decode(tiff([strip], 1, 3, {258: (8, 8), 262: 1, 277: 2, 338: 1}))
    except ValueError as error:
        assert str(error) == 'is not a picture in a known format'
        pytest.skip('this version of Pillow does not read such files')
    np.testing.assert_allclose(picture[0, :, 0], [255, 100 + 55, 50], atol=1)


@pytest.mark.parametrize(('bits', 'sample_format'), [(32, 1), (32, 2), (16, 2)])
def test_whole_numbers_of_an_unknown_range_are_an_error(bits, sample_format):
    """A picture of 0 … 255 in 32 bits would become black."""
    strip = np.arange(0, 256, 51).astype(f'<i{bits // 8}').tobytes()
    with pytest.raises(ValueError, match='range is unknown: save it with 8 or 16 bits'):
        decode(tiff([strip], 1, 6, {258: bits, 262: 1, 277: 1, 339: sample_format}))


def test_values_of_more_than_sixteen_bits_in_a_format_of_a_config_are_an_error(monkeypatch):
    """They would wrap around."""
    monkeypatch.setitem(pictures.FORMATS, 'FITS', ('.fits',))
    cards = {'SIMPLE': 'T', 'BITPIX': 32, 'NAXIS': 2, 'NAXIS1': 2, 'NAXIS2': 1}
    header = ''.join(f'{key:8}= {value:>20}'.ljust(80) for key, value in cards.items()) + 'END'
    for values in ([-5, 3], [3, 70000]):
        content = header.ljust(2880).encode() + np.array(values, '>i4').tobytes().ljust(2880, b'\0')
        with pytest.raises(ValueError, match=f'has values from {values[0]} to {values[1]}, but 0 … 65535'):
            decode(content)


@pytest.mark.parametrize('compressed', [True, False])
def test_colours_of_sixteen_bits_in_planes_are_an_error(compressed):
    strips = [COLOURS[..., i].astype('<u2').tobytes() for i in range(3)]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    tags = {258: (16, 16, 16), 259: 8 if compressed else 1, 262: 2, 277: 3, 284: 2}
    with pytest.raises(ValueError, match='16 bits in planes, which Pillow misreads'):
        decode(tiff(strips, 5, 7, tags))


@pytest.mark.parametrize('compressed', [True, False])
def test_colours_in_planes_are_right(compressed):
    colours = noise(1, 5, 7, 3)[0]
    strips = [colours[..., i].tobytes() for i in range(3)]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    tags = {258: (8, 8, 8), 259: 8 if compressed else 1, 262: 2, 277: 3, 284: 2}
    np.testing.assert_array_equal(decode(tiff(strips, 5, 7, tags)), colours)


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


@pytest.mark.parametrize('compression', [None, 'tiff_lzw'])
def test_the_orientation_of_a_tiff_file_is_applied_once(compression):
    stored = places(6, 9)
    content = encoded(stored, 'tiff', tiffinfo={274: 6}, **({'compression': compression} if compression else {}))
    np.testing.assert_array_equal(decode(content), UPRIGHT[6](stored))


def test_the_orientation_of_colours_of_sixteen_bits_is_applied():
    stored = places(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png(stored * np.uint16(257), 16, 2, chunk(b'eXIf', exif.tobytes().removeprefix(b'Exif\0\0')))
    np.testing.assert_array_equal(decode(content), UPRIGHT[6](stored))


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
