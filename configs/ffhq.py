"""FFHQ at 256×256 (Karras et al. 2018, arXiv:1812.04948), with DDPM's settings for CelebA-HQ: 113,673,219 parameters.

    diffusion --config=ffhq --workdir=runs/ffhq --config.data.source=folder:/path/to/images1024x1024

The TFDS catalogue does not have these 70,000 pictures; the source is a folder or a zip file. Decoded, they take 14 GB
in data.cache_dir. Ho et al. trained CelebA-HQ for 500,000 steps of 64 images on a TPU v3-128.
"""

from ml_collections import ConfigDict

from diffusion.configs import lsun_church


def get_config() -> ConfigDict:
    config = lsun_church.get_config()
    config.data.source = 'folder:ffhq'
    config.train.num_steps = 500_000
    return config
