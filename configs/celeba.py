"""CelebA at 64×64, as in DDIM (Song et al. 2020, arXiv:2010.02502): 78,700,803 parameters.

    diffusion --config=celeba --workdir=runs/celeba --config.data.source=folder:/path/to/img_align_celeba.zip

reads the aligned pictures as their authors packed them, all 202,599 of them. With TensorFlow, the split train alone:

    make prepare DATASET=celeb_a
    diffusion --config=celeba --workdir=runs/celeba

The crop is DDIM's: the 128×128 pixels around row 121, column 89. Song et al. report FID 3.26 (1000 steps, η = 1,
variance 'large') and 9.17 for 50 DDIM steps (spacing 'uniform').
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.data.source = 'tfds:celeb_a'
    config.data.image_size = 64
    config.data.crop = 'ddim'
    config.model.multipliers = (1, 2, 2, 2, 4)
    return config
