"""CelebA at 64×64, as in DDIM (Song et al. 2020, arXiv:2010.02502): 78,700,803 parameters.

    python main.py --config=configs/celeba.py --workdir=runs/celeba

The crop is DDIM's: 128×128 pixels around row 121, column 89, resized to 64×64. Song et al. report
FID 3.26 (1000 steps, η = 1, large variance) and 9.17 for 50 DDIM steps ('uniform' spacing).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.source = 'tfds:celeb_a'
    config.data.image_size = 64
    config.data.crop = 'ddim'
    config.model.multipliers = (1, 2, 2, 2, 4)
    return config
