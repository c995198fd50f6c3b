"""Resizing to the input of feature networks, against closed forms for ramps, and against Pillow."""

import numpy as np
import pytest
from PIL import Image

from diffusion.metrics import resize
from diffusion.metrics.resize import DIALECTS, OF_INCEPTION, preprocess

SIZES = [8, 64, 299, 300]


def ramp(size):
    """One image whose value is its column."""
    return np.broadcast_to(np.arange(size, dtype=np.uint8)[None, None, :, None], (1, size, size, 3))


@pytest.mark.parametrize('size', [8, 32, 200])
def test_the_legacy_dialects_sample_from_the_corner(size):
    """Output column i lies at i·size/299, and the last column of the image is repeated."""
    expected = np.minimum(np.arange(299) * size / 299, size - 1)
    for dialect in ('adm', 'torch-fidelity'):
        values = preprocess(ramp(size), DIALECTS[dialect], 299)[0, 7, :, 1]
        np.testing.assert_allclose(values, (expected - 128) / 128, atol=1e-5)


@pytest.mark.parametrize('size', [8, 32, 200])
def test_pytorch_fid_samples_at_the_centers_of_pixels(size):
    expected = np.clip((np.arange(299) + 0.5) * size / 299 - 0.5, 0, size - 1)
    values = preprocess(ramp(size), DIALECTS['pytorch-fid'], 299)[0, 7, :, 1]
    np.testing.assert_allclose(values, 2 * expected / 255 - 1, atol=1e-5)


@pytest.mark.parametrize('height', SIZES)
@pytest.mark.parametrize('width', [17, 640])
def test_clean_fid_resizes_as_pillow_does_with_floats(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC) for c in range(3)]
    expected = (np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 255) - 128) / 128
    np.testing.assert_allclose(preprocess(image[None], DIALECTS['clean-fid'], 299)[0], expected, atol=1e-5)


@pytest.mark.parametrize('height, width', [(8, 8), (32, 17), (224, 32), (224, 224), (500, 640)])
def test_dgm_eval_resizes_as_pillow_does_with_bytes(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC))
    expected = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(preprocess(image[None], DIALECTS['dgm-eval'], 224)[0], expected, atol=1e-5)


@pytest.mark.parametrize('dialect', OF_INCEPTION)
@pytest.mark.parametrize('size', SIZES)
def test_a_flat_image_stays_flat_and_grey_becomes_three_channels(dialect, size):
    values = np.asarray(preprocess(np.full((2, size, size, 1), 192, np.uint8), DIALECTS[dialect], 299))
    assert values.shape == (2, 299, 299, 3)
    np.testing.assert_allclose(values, 0.5 if dialect != 'pytorch-fid' else 2 * 192 / 255 - 1, atol=1e-6)


def test_an_image_of_the_right_size_is_not_changed():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    for dialect in DIALECTS.values():
        expected = dialect.to_range(image.astype(np.float32))
        np.testing.assert_allclose(preprocess(image, dialect, 299), expected, rtol=1e-6, atol=2e-7)


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match='2 channels, but feature networks take 1 or 3'):
        preprocess(np.zeros((1, 8, 8, 2), np.uint8), resize.EFFICIENTNET, 224)
