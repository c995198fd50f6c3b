"""LSUN bedrooms at 256×256, as in DDPM (Ho et al. 2020, arXiv:2006.11239): 113,673,219 parameters.

    make prepare DATASET=lsun/bedroom
    diffusion --config=lsun_bedroom --workdir=runs/lsun_bedroom --config.model.dtype=bfloat16

The authors trained for 2.4 million steps of 64 images on a TPU v3-128; they report FID 6.36 (1000 steps, η = 1).
Decoded, the 3,033,042 images would take 596 GB, so each batch is decoded when it is needed. To decode all images once:
--config.data.cache=True --config.data.cache_dir=…
"""

from ml_collections import ConfigDict

from diffusion.configs import lsun_church


def get_config() -> ConfigDict:
    config = lsun_church.get_config()
    config.data.source = 'tfds:lsun/bedroom'
    config.data.flip = False
    config.data.cache = False
    config.train.num_steps = 2_400_000
    return config
