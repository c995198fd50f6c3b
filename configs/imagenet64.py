"""ImageNet at 64×64 (van den Oord et al. 2016, arXiv:1601.06759), after improved-diffusion's unconditional model.

    make prepare DATASET=downsampled_imagenet/64x64
    diffusion --config=imagenet64 --workdir=runs/imagenet64

Nichol & Dhariwal 2021 (arXiv:2102.09672) trained this network 1.5 million steps of 128 images with L_hybrid, and report
3.57 bits/dim; by the other loss, --config.train.loss=vlb_importance, 3.53 and worse images.
Decoded, the 1,281,149 images take 16 GB in data.cache_dir. The held-out split is called validation.
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.data.source = 'tfds:downsampled_imagenet/64x64'
    config.data.image_size = 64
    config.data.flip = False
    config.model.network = 'adm'
    config.model.variance = 'learned'
    config.model.multipliers = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.attention_resolutions = (16, 8)
    config.model.num_heads = 4
    config.model.dropout = 0.0
    config.model.norm_epsilon = 1e-5
    config.model.downsample_padding = 1
    config.model.embedding_order = 'cos_sin'
    config.model.embedding_shift = 0
    config.model.level_scale = 0.25  # 1000/T
    config.schedule.name = 'cosine'
    config.schedule.T = 4000
    config.train.loss = 'hybrid'
    config.train.num_steps = 1_500_000
    config.train.learning_rate = 1e-4
    config.likelihood.split = 'validation'
    return config
