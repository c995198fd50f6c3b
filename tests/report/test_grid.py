"""The grid of images."""

import numpy as np
import pytest
from PIL import Image

from diffusion.report.grid import GAP, save_grid
from tests.galleries import noise


def saved(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize('channels', [1, 3])
def test_images_are_enlarged_and_placed_row_by_row(tmp_path, channels):
    images = noise(5, 16, 12, channels)
    path = tmp_path / 'folder' / 'grid.png'
    grid = save_grid(str(path), images)
    np.testing.assert_array_equal(saved(path).reshape(grid.shape), grid)
    height, width = 48 + GAP, 36 + GAP  # enlarged by 3, the whole factor nearest to 48/16
    assert grid.shape == (2 * height + GAP, 3 * width + GAP, channels)
    rest = np.ones(grid.shape, bool)
    for i, image in enumerate(images):
        top, left = i // 3 * height + GAP, i % 3 * width + GAP
        for row in range(3):
            for column in range(3):
                np.testing.assert_array_equal(grid[top + row : top + 48 : 3, left + column : left + 36 : 3], image)
        rest[top : top + 48, left : left + 36] = False
    assert len(np.unique(grid[rest])) == 1


def test_only_the_first_images_are_shown_and_large_ones_are_not_enlarged(tmp_path):
    images = noise(9, 100, 100, 1)
    grid = save_grid(str(tmp_path / 'grid.png'), images, most=4)
    assert grid.shape == (2 * 100 + 3 * GAP, 2 * 100 + 3 * GAP, 1)
    np.testing.assert_array_equal(grid[-100 - GAP : -GAP, -100 - GAP : -GAP], images[3])


def test_other_numbers_of_channels_are_averaged(tmp_path):
    images = np.stack([np.full((2, 48, 48), level, np.uint8) for level in (10, 21)], axis=-1)
    grid = save_grid(str(tmp_path / 'grid.png'), images)
    assert grid.shape[-1] == 1 and grid[GAP, GAP, 0] == 16  # 15.5, rounded to even
