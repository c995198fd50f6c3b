"""MNIST at 28×28: handwritten digits, 60,000 for training and 10,000 held out.

    diffusion --config=mnist --workdir=runs/mnist --config.data.source=folder:/path/to/mnist.zip

reads a folder or a zip file of the pictures, with train/ and test/. Without one, TensorFlow downloads them:

    make prepare DATASET=mnist
    diffusion --config=mnist --workdir=runs/mnist

4,000 steps of 32 images take 20 minutes to an hour on two CPU cores.
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.data.source = 'tfds:mnist'
    config.data.image_size = 28
    config.data.channels = 1
    config.data.flip = False

    config.model.channels = 32
    config.model.multipliers = (1, 2, 2)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (7,)
    config.model.groups = 8
    config.model.dropout = 0.0

    config.train.batch_size = 32
    config.train.num_steps = 4000
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 500
    config.train.ema_decay = 0.999
    config.train.checkpoint_every = 1000
    config.train.log_every = 100
    config.train.sample_every = 2000

    config.sample.num_images = 1000
    config.sample.num_steps = 50
    config.sample.eta = 0.0
    config.sample.variance = 'small'

    config.likelihood.quantities = ('posterior',)
    config.likelihood.levels = 20
    return config
