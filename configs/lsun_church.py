"""LSUN churches at 256×256, as in DDPM (Ho et al. 2020, arXiv:2006.11239): 113,673,219 parameters.

    make prepare DATASET=lsun/church_outdoor
    diffusion --config=lsun_church --workdir=runs/lsun_church --config.model.dtype=bfloat16

The authors trained for 1.2 million steps of 64 images on a TPU v3-128; they report FID 7.89 (1000 steps, η = 1).
Decoded, the 126,227 images take 25 GB in data.cache_dir.
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.data.source = 'tfds:lsun/church_outdoor'
    config.data.image_size = 256
    config.data.crop = 'center'
    config.data.flip = True
    config.model.multipliers = (1, 1, 2, 2, 4, 4)
    config.model.dropout = 0.0
    config.train.batch_size = 64
    config.train.num_steps = 1_200_000
    config.train.learning_rate = 2e-5
    config.sample.variance = 'small'  # as in the authors' code for 256×256; only their code for CIFAR-10 has σ² = β
    return config
