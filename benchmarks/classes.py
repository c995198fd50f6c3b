"""The share of each class among samples, as a classifier (an SVC on pixels) says that real images have taught.

    python -m benchmarks.classes SOURCE IMAGE_SIZE CHANNELS samples.npz …        SOURCE: tfds:mnist, folder:PATH, digits

Also how often the classifier is right on images that it has not seen.
"""

import sys

import numpy as np
from sklearn.svm import SVC

from diffusion import data

MOST = 10_000  # images that it learns from


def main():
    source, image_size, channels, *paths = sys.argv[1:]
    how = dict(image_size=int(image_size), channels=int(channels))
    train, test = (data.load(source, split, **how) for split in ('train', 'test'))
    chosen = np.random.default_rng(0).permutation(len(train))[:MOST]
    classifier = SVC(C=10).fit(flat(train[chosen]), train.labels[chosen])
    seen = np.arange(min(len(test), 2000)) * (len(test) // min(len(test), 2000))
    right = (classifier.predict(flat(test[seen])) == test.labels[seen]).mean()
    print(f'right on {right:.1%} of {len(seen)} held-out images')
    for path in paths:
        with np.load(path) as arrays:
            images = arrays['arr_0']
        counts = np.bincount(classifier.predict(flat(images)), minlength=len(train.record['classes']))
        shares = ', '.join(
            f'{name} {n / len(images):.1%}' for name, n in zip(train.record['classes'], counts, strict=True)
        )
        print(f'{path}\n  {len(images)} images: {shares}')


def flat(images):
    return data.to_float(images).reshape(len(images), -1)


if __name__ == '__main__':
    main()
