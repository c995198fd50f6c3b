"""Handwritten digits at 8×8 with a transformer on patches of 2×2 pixels: minutes on two CPU cores.

    diffusion --config=digits_dit --workdir=runs/digits_dit
    diffusion --workdir=runs/digits_dit --mode=sample

Patches this small allow any model.kind. For larger pictures take larger patches, and with patches of as many values as
model.channels, or more, model.kind='x0' (diffusion/networks/dit.py).
"""

from ml_collections import ConfigDict

from diffusion.configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.model.network = 'dit'
    config.model.kind = 'v'
    config.model.channels = 64
    config.model.depth = 4
    config.model.patch_size = 2
    config.model.head_channels = 32
    config.train.learning_rate = 1e-3
    return config
