"""Images as PNG files: a grid of them in one file, or each in its own."""

import math
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion.util import replacing

GAP = 4  # pixels between images and around the grid
ROW = 10  # images of a class


def save_grid(
    path: str,
    images: UInt8[np.ndarray, 'N H W C'],
    *,
    most: int = 100,
    tile: int = 48,
    columns: int = 0,
    classes: int = 0,
) -> UInt8[np.ndarray, 'height width C']:
    """Write the first `most` images as a grid with gaps between them.

    Args:
        path: the PNG file; its folder is created if it does not exist.
        images: (N, H, W, C), in 0 … 255. If C is neither 1 nor 3, the channels are averaged to grey.
        most: the largest number of images.
        tile: the height in pixels to which smaller images are enlarged, rounded to a whole factor, without
            interpolation.
        columns: images in a row; 0 makes the grid square.
        classes: if more than 1, image i is of class i mod `classes`, and each row shows the images of one class, if
            there are enough.

    Returns:
        The grid, (height, width, 1 or 3).

    Raises:
        OSError: the file cannot be written.
    """
    if classes > 1 and len(images) >= (classes if classes <= ROW else 2 * classes):
        columns = min(len(images) // classes, ROW)
        rows = min(classes, most // columns)
        images = images[(np.arange(rows)[:, None] + np.arange(columns) * classes).ravel()]
    images = np.asarray(images[:most])
    if images.shape[-1] not in (1, 3):
        images = images.mean(-1, keepdims=True).round().astype(np.uint8)
    factor = max(1, round(tile / images.shape[1]))
    images = images.repeat(factor, 1).repeat(factor, 2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 127, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP) + GAP, i % columns * (width + GAP) + GAP
        grid[top : top + height, left : left + width] = image
    _save(path, grid)
    return grid


def save_each(folder: str, images: UInt8[np.ndarray, 'N H W C']) -> None:
    """Write each image as a PNG file: 000000.png, 000001.png and so on.

    Args:
        folder: it is created if it does not exist.
        images: (N, H, W, 1 or 3), in 0 … 255.

    Raises:
        OSError: a file cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    for i, image in enumerate(images):
        _save(os.path.join(folder, f'{i:06d}.png'), image)


def _save(path, image):
    with replacing(path) as file:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, 'PNG')
