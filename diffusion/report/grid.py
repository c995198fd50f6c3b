"""A sheet of images as one PNG."""

import math
import os

import numpy as np
from PIL import Image

GAP = 4  # pixels


def save_grid(path, images, *, most=100, tile=48):
    """Write the first `most` images, uint8 (N, H, W, 1 or 3), as a square sheet with gaps between them.

    Images smaller than `tile` pixels are enlarged by a whole factor, pixel by pixel. Channels other
    than 1 or 3 are averaged to grey. Returns the sheet, uint8 (height, width, 1 or 3).
    """
    images = np.asarray(images[:most])
    if images.shape[-1] not in (1, 3):
        images = images.mean(-1, keepdims=True).round().astype(np.uint8)
    factor = max(1, round(tile / images.shape[1]))
    images = images.repeat(factor, 1).repeat(factor, 2)
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 127, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP) + GAP, i % columns * (width + GAP) + GAP
        sheet[top : top + height, left : left + width] = image
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(path)
    return sheet
