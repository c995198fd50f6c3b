"""Measure the share of each class among samples, as named by a classifier (an SVC on pixels) of the real images.

    python -m benchmarks.classes SOURCE SIZE CHANNELS samples.npz …        SOURCE: tfds:mnist, folder:PATH, digits

Also print the accuracy of the classifier on held-out images and, of samples that were drawn by class (arr_1), the share
of each class that is recognized as such.
"""

import sys

import numpy as np
from sklearn.svm import SVC

from diffusion import data

MOST = 10_000  # training images of the classifier


def main() -> None:
    """Print the shares for each samples.npz."""
    source, image_size, channels, *paths = sys.argv[1:]
    how = dict(image_size=int(image_size), channels=int(channels))
    train, test = (data.load(source, split, **how) for split in ('train', 'test'))
    chosen = np.random.default_rng(0).permutation(len(train))[:MOST]
    classifier = SVC(C=10).fit(flat(train[chosen]), train.labels[chosen])
    held_out = np.arange(min(len(test), 2000)) * (len(test) // min(len(test), 2000))
    accuracy = (classifier.predict(flat(test[held_out])) == test.labels[held_out]).mean()
    print(f'accuracy {accuracy:.1%} on {len(held_out)} held-out images')
    for path in paths:
        with np.load(path) as arrays:
            images, asked = arrays['arr_0'], arrays.get('arr_1')
        named, classes = classifier.predict(flat(images)), train.record['classes']
        shares = ', '.join(f'{name} {(named == i).mean():.1%}' for i, name in enumerate(classes))
        print(f'{path}\n  {len(images)} images: {shares}')
        if asked is not None:
            found = ', '.join(f'{classes[i]} {(named[asked == i] == i).mean():.1%}' for i in np.unique(asked))
            print(f'  recognized: {found}')


def flat(images: np.ndarray) -> np.ndarray:
    """Turn images (N, H, W, C) uint8 into vectors (N, H·W·C) float32 in [−1, 1]."""
    return data.to_float(images).reshape(len(images), -1)


if __name__ == '__main__':
    main()
