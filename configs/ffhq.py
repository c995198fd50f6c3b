"""FFHQ at 256×256 (Karras et al. 2018, arXiv:1812.04948), with DDPM's settings for CelebA-HQ: 113,673,219 parameters.

    python main.py --config=configs/ffhq.py --workdir=runs/ffhq --config.data.source=folder:/path/to/images1024x1024

The 70,000 pictures are not in the TFDS catalogue: unpack them, or leave them in one zip file. Decoded, they
take 14 GB in data.cache_dir. Ho et al. trained CelebA-HQ for 500,000 steps of 64 images on a TPU v3-128.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.source = 'folder:ffhq'
    config.data.image_size = 256
    config.data.crop = 'center'
    config.model.multipliers = (1, 1, 2, 2, 4, 4)
    config.model.dropout = 0.0
    config.train.batch_size = 64
    config.train.num_steps = 500_000
    config.train.learning_rate = 2e-5
    return config
