"""CIFAR-10 at 32×32, as in DDPM (Ho et al. 2020, arXiv:2006.11239): 35,746,307 parameters.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

800,000 steps of 128 images took the authors 10.6 hours on a TPU v3-8; they report FID 3.17 (1000 steps,
η = 1, large variance) and at most 3.75 bits/dim, and Song et al. 2020 FID 4.67 for 50 DDIM steps with
'quad' spacing (the DDIM code then visits 49 different levels, which this project refuses to call 50;
sample.compat='ddim' does the same).
"""

from configs import default


def get_config():
    return default.get_config()
