"""ImageNet at 64×64 (van den Oord et al. 2016, arXiv:1601.06759), after improved-diffusion's unconditional model.

    make prepare DATASET=downsampled_imagenet/64x64
    diffusion --config=imagenet64 --workdir=runs/imagenet64

Nichol & Dhariwal 2021 (arXiv:2102.09672) trained 1.5 million steps of 128 images with the cosine schedule, T = 4000,
3 blocks per resolution, widths 128 × (1, 2, 3, 4), and attention at 16 and 8. Their network also has learned variances,
four heads, and scale and shift, which this one does not have; do not expect their 3.53 bits/dim.
Decoded, the 1,281,149 images take 16 GB in data.cache_dir. The held-out split is called validation.
"""

from diffusion.configs import default


def get_config():
    config = default.get_config()
    config.data.source = 'tfds:downsampled_imagenet/64x64'
    config.data.image_size = 64
    config.data.flip = False
    config.model.multipliers = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.attention_resolutions = (16, 8)
    config.model.dropout = 0.0
    config.schedule.name = 'cosine'
    config.schedule.T = 4000
    config.train.num_steps = 1_500_000
    config.train.learning_rate = 1e-4
    config.likelihood.split = 'validation'
    return config
