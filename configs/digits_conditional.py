"""Handwritten digits at 8×8 with their classes, and guidance: minutes on two CPU cores.

    diffusion --config=digits_conditional --workdir=runs/digits_conditional
    diffusion --workdir=runs/digits_conditional --mode=sample
    diffusion --workdir=runs/digits_conditional --mode=sample --config.sample.labels=3,7 --config.sample.guidance=3

The network is that of `digits`, with an embedding of the class. A tenth of the labels is hidden in training, so that
the network is also an unconditional model, by which samples are guided.
"""

from ml_collections import ConfigDict

from diffusion.configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.data.labels = True
    config.train.label_dropout = 0.1
    config.sample.guidance = 1.5
    return config
