"""Measure the quality of samples of the digits: Fréchet distance of raw pixels, and the share of each class.

    python -m benchmarks.digits runs/digits/samples/*/samples.npz

All 1,797 real digits are the reference; they also train the classifier (an SVC) that names the samples.
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from diffusion import data
from diffusion.metrics import frechet


def quality(images: np.ndarray) -> tuple[float, np.ndarray]:
    """Compare samples with the real digits.

    Args:
        images: (N, 8, 8, 1) uint8.

    Returns:
        (Fréchet distance of raw pixels in [−1, 1], share of each class (10,)).
    """
    digits = load_digits()
    real = data.to_float(np.round(digits.images * (255 / 16)).astype(np.uint8))
    fake = data.to_float(images)
    distance = frechet.distance(frechet.moments([fake]), frechet.moments([real]))
    classifier = SVC().fit(real.reshape(-1, 64), digits.target)
    counts = np.bincount(classifier.predict(fake.reshape(-1, 64)), minlength=10)
    return distance, counts / len(images)


def main() -> None:
    """Print the quality of each samples.npz."""
    for path in sys.argv[1:]:
        with np.load(path) as arrays:
            images = arrays['arr_0']
        distance, shares = quality(images)
        print(path)
        print(
            f'  {len(images)} images; Fréchet distance {distance:.3f}; classes ' + ' '.join(f'{s:.1%}' for s in shares)
        )


if __name__ == '__main__':
    main()
