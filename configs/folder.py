"""Your own pictures: size, channels and their number are found out, and a network is chosen and printed.

    python main.py --config=configs/folder.py --workdir=runs/mine --config.data.source=folder:/path/to/pictures

--mode=data shows what the network would see.
A zip file will do as well. Pictures of other shapes are cut to their largest central square; where they differ in
size, image_size is a power of two that 99 of 100 of them reach, at most 64. Any choice can be made by hand:
--config.data.image_size=128 --config.model.channels=64. The first run's choices stand in workdir/config.json, and
later ones keep them.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.source = 'folder:'
    config.data.image_size = 0
    config.data.channels = 0
    config.data.crop = 'center'
    config.model.channels = 0
    config.train.batch_size = 32
    config.train.num_steps = 100_000
    config.train.warmup_steps = 1000
    config.train.ema_decay = 0.9995
    config.train.checkpoint_every = 1000
    config.train.sample_every = 1000
    config.sample.num_steps = 100
    config.sample.eta = 0.0
    config.sample.variance = 'small'
    return config
