"""Your own pictures, in a folder or a zip file.

    diffusion --config=folder --workdir=runs/mine --mode=data --config.data.source=folder:/path/to/pictures
    diffusion --config=folder --workdir=runs/mine --config.data.source=folder:/path/to/pictures

The first command shows what the network will see, and which folders are taken for the splits; the second trains. Image
size, channels and network are chosen from the pictures and printed.
Pictures that are not square are cropped to their largest central square. If the pictures differ in size, image_size is
the largest power of two that 99 of 100 of them reach, at most 64; a few that are far smaller are left out. Each choice
can be made by hand, for example --config.data.image_size=128 --config.model.channels=64. The choices of the first
command are stored in config.json in the workdir, and later commands use them.
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
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
