"""CIFAR-10 at 32×32 with its ten classes, and guidance; otherwise as `cifar10`, DDPM's network and training.

    diffusion --config=cifar10_conditional --workdir=runs/conditional --config.data.source=folder:/path/to/cifar10.zip

reads a folder or a zip file with the pictures of each class in a folder of its own: train/airplane/, test/airplane/ and
so on. Without one, TensorFlow downloads them:

    make prepare DATASET=cifar10
    diffusion --config=cifar10_conditional --workdir=runs/conditional

A tenth of the labels is hidden in training, as for classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
sample.guidance=1 is the conditional model itself; larger scales make images more typical of their class, and less
diverse.

A training step takes 5.7 GB on one H100. This checks it without the data, so the number of classes is given:

    diffusion --config=cifar10_conditional --workdir=runs/plan --mode=plan --config.plan.target=h100:1 \\
        --config.model.num_classes=10
"""

from ml_collections import ConfigDict

from diffusion.configs import cifar10


def get_config() -> ConfigDict:
    config = cifar10.get_config()
    config.data.labels = True
    config.train.label_dropout = 0.1
    config.sample.guidance = 1.5
    return config
