"""Handwritten digits at 8×8, which scikit-learn ships: all modes within minutes on two CPU cores.

diffusion --config=digits --workdir=runs/digits
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()

    config.data.source = 'digits'
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False

    config.model.channels = 32
    config.model.multipliers = (1, 2)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.groups = 8
    config.model.dropout = 0.0

    config.train.batch_size = 32
    config.train.num_steps = 4000
    config.train.learning_rate = 2e-3
    config.train.warmup_steps = 200
    config.train.ema_decay = 0.998
    config.train.checkpoint_every = 1000
    config.train.log_every = 50
    config.train.sample_every = 1000

    config.sample.num_images = 1000
    config.sample.num_steps = 50
    config.sample.eta = 0.0
    config.sample.variance = 'small'
    config.sample.batch_size = 250

    config.sweep.num_steps = (10, 20, 50, 100)  # without 1,000, and with few images: within three minutes
    config.sweep.num_images = 300
    return config
