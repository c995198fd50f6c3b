"""DINOv2's network; tests/peers/test_metrics.py compares it with PyTorch."""

import numpy as np
import pytest

from diffusion.metrics import dinov2
from diffusion.metrics.tables import FEATURES


def test_the_network_has_the_published_number_of_parameters():
    """timm's table of models lists 304.4 million."""
    assert round(sum(int(np.prod(shape)) for shape in dinov2.shapes().values()) / 1e6, 1) == 304.4


def test_tensors_of_another_network_are_refused():
    tensors = {name: np.zeros(shape, np.float32) for name, shape in dinov2.shapes(width=128, depth=1).items()}
    with pytest.raises(ValueError, match=r"vits\.pth does not hold DINOv2's ViT-L/14: .*blocks\.1\.norm1\.weight"):
        dinov2.convert(tensors, 'vits.pth', width=128, depth=2)


def test_constant_position_embeddings_stay_constant():
    tensors = {name: np.zeros(shape, np.float32) for name, shape in dinov2.shapes(width=64, depth=1).items()}
    tensors['pos_embed'][:] = 3.0
    tensors['pos_embed'][0, 0] = -1.0
    positions = dinov2.convert(tensors, '', width=64, depth=1)['pos_embed']
    assert positions.shape == (1 + 16 * 16, 64)
    np.testing.assert_array_equal(positions[0], -1)
    np.testing.assert_allclose(positions[1:], 3, rtol=1e-6)


def test_position_embeddings_are_resized_as_in_their_code():
    """By a ratio of 16.1/37; bicubic with a = −¾, where the border is repeated beyond it."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in dinov2.shapes(width=64, depth=1).items()}
    rows = np.random.default_rng(0).normal(size=37)
    tensors['pos_embed'][0, 1:] = np.repeat(rows, 37)[:, None]
    found = dinov2.convert(tensors, '', width=64, depth=1)['pos_embed'][1:].reshape(16, 16, 64)
    distances = np.abs((np.arange(16)[:, None] + 0.5) * 37 / 16.1 - 0.5 - np.arange(-3, 40))
    near, far = np.polyval([1.25, -2.25, 0, 1], distances), -0.75 * np.polyval([1, -5, 8, -4], distances)
    weights = np.where(distances < 1, near, np.where(distances < 2, far, 0))
    expected = weights @ rows[np.arange(-3, 40).clip(0, 36)]
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None], found.shape), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('dialect', FEATURES['dinov2'].dialects)
def test_each_image_has_features_of_its_own(dialect):
    rng = np.random.default_rng(0)
    shapes = dinov2.shapes(width=64, depth=1)
    tensors = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    params = dinov2.convert(tensors, '', width=64, depth=1)
    images = rng.integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    (features,) = FEATURES['dinov2'].extract(params, images, dialect).values()
    assert features.shape == (3, 64)
    (alone,) = FEATURES['dinov2'].extract(params, images[1:2], dialect).values()
    np.testing.assert_allclose(features[1:2], alone, atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 0.01
