"""ImageNet at 64×64 with its 1,000 classes, after guided-diffusion's network and training.

    make prepare DATASET=imagenet_resized/64x64
    diffusion --config=imagenet64_conditional --workdir=runs/imagenet64_conditional

Dhariwal & Nichol 2021 (arXiv:2105.05233) trained 540,000 steps of 2,048 images. To draw with their weights, which the
importer recognizes by the file's name:

    diffusion --config=imagenet64_conditional --workdir=runs/openai --mode=import_weights \\
        --config.interop.source=openai:/path/64x64_diffusion.pt

They hid no labels; here a tenth is hidden, so that the network is also an unconditional model, by which samples are
guided. Decoded, the 1,281,167 images take 16 GB in data.cache_dir. The held-out split is called validation.

On eight H100s, a training step takes 14.7 GB a device, of the 63.7 GB that JAX can use, and 16 GB more if the images
are kept there (data.placement). One device needs train.accumulate=32, for the same 64 images at a time. To check:

    diffusion --config=imagenet64_conditional --workdir=runs/plan --mode=plan --config.plan.target=h100:8
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.data.source = 'tfds:imagenet_resized/64x64'
    config.data.image_size = 64
    config.data.labels = True
    config.model.network = 'adm'
    config.model.variance = 'learned'
    config.model.num_classes = 1000
    config.model.channels = 192
    config.model.multipliers = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.attention_resolutions = (32, 16, 8)
    config.model.head_channels = 64
    config.model.scale_shift_norm = True
    config.model.resblock_updown = True
    config.model.dropout = 0.1
    config.model.norm_epsilon = 1e-5
    config.model.downsample_padding = 1
    config.model.embedding_order = 'cos_sin'
    config.model.embedding_shift = 0
    config.model.dtype = 'bfloat16'
    config.model.remat = True
    config.schedule.name = 'cosine'
    config.train.loss = 'hybrid'
    config.train.label_dropout = 0.1
    config.train.batch_size = 2048
    config.train.accumulate = 4
    config.train.num_steps = 540_000
    config.train.learning_rate = 3e-4
    config.likelihood.split = 'validation'
    return config
