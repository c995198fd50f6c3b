"""The data: sources of pictures, the cache of decoded images, and the batches of training.

A *picture* is what a source contains, of any size. An *image* is a preprocessed picture: uint8 (H, W, C), and all
images of a data set have the same shape.
"""

from diffusion.data.images import Images, join_records, labelled, labels_sha256
from diffusion.data.load import decode, load, open_pictures, require_usable
from diffusion.data.order import Order, own_shards
from diffusion.data.pixels import to_float, to_uint8
from diffusion.data.prefetch import prefetch
from diffusion.data.survey import Survey, survey

__all__ = [
    'Images',
    'Order',
    'Survey',
    'decode',
    'join_records',
    'labelled',
    'labels_sha256',
    'load',
    'open_pictures',
    'own_shards',
    'prefetch',
    'require_usable',
    'survey',
    'to_float',
    'to_uint8',
]
