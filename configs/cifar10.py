"""CIFAR-10 at 32×32, as in DDPM (Ho et al. 2020, arXiv:2006.11239): 35,746,307 parameters.

    diffusion --config=cifar10 --workdir=runs/cifar10 --config.data.source=folder:/path/to/cifar10.zip

reads a folder or a zip file of the pictures, with train/ and test/. Without one, TensorFlow downloads them:

    make prepare DATASET=cifar10
    diffusion --config=cifar10 --workdir=runs/cifar10

800,000 steps of 128 images took the authors 10.6 hours on a TPU v3-8. They report FID 3.17 (1000 steps, η = 1,
variance 'large') and at most 3.75 bits/dim. Song et al. 2020 report FID 4.67 for 50 DDIM steps with spacing 'quad'.
With it their code visits only 49 levels, so 'quad' with sample.num_steps=50 is refused here; sample.compat='ddim'
repeats what their code does.
"""

from ml_collections import ConfigDict

from diffusion.configs import default


def get_config() -> ConfigDict:
    return default.get_config()
