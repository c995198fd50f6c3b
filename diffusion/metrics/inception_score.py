"""The Inception score, as ADM's evaluator and as torch-fidelity define it."""

from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Float64

ADM_BLOCK = 5000  # images
SPLITS = 10  # torch-fidelity's
SEED = 2020  # torch-fidelity's, of the permutation


class Score(NamedTuple):
    """The Inception score.

    Attributes:
        value: the mean over the parts.
        standard_error: of the value.
        spread: the standard deviation over the parts, which torch-fidelity prints.
        influences: (N,), of each image on the value, in the order of the images.
    """

    value: float
    standard_error: float
    spread: float
    influences: Float64[np.ndarray, 'N']


def adm(logits: Float[np.ndarray, 'N classes']) -> Score:
    """Compute the score over blocks of 5,000 images in their order; the last block may be shorter.

    Args:
        logits: (N, 1008), without bias.

    Returns:
        The score.
    """
    return score([logits[start : start + ADM_BLOCK] for start in range(0, len(logits), ADM_BLOCK)])


def torch_fidelity(logits: Float[np.ndarray, 'N classes']) -> Score:
    """Compute the score over ten equal parts of the images in torch-fidelity's random order.

    Args:
        logits: (N, 1008), without bias.

    Returns:
        The score.

    Raises:
        ValueError: there are fewer than ten images.
    """
    count = len(logits)
    if count < SPLITS:
        raise ValueError(f'{SPLITS} parts need at least {SPLITS} images, but there are {count}')
    order = np.random.RandomState(SEED).permutation(count)
    found = score([logits[order[i * count // SPLITS : (i + 1) * count // SPLITS]] for i in range(SPLITS)])
    return found._replace(influences=found.influences[np.argsort(order)])


def score(parts: list[Float[np.ndarray, '_ classes']]) -> Score:
    """Compute the mean over parts of exp E_x[KL(p(y|x) ‖ p(y))], where p(y) is the part's mean (arXiv:1606.03498, §4).

    The standard error follows from the influence of each image on the logarithm of its part's score, which is the KL of
    the image minus the mean KL. The parts are independent. The score of n images is biased downwards, by a term in 1/n.

    Args:
        parts: the logits of each part, (n, classes).

    Returns:
        The score; its influences are those of the images in the order of the parts.
    """
    values, influences = [], []
    count = sum(map(len, parts))
    for logits in parts:
        log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(log_p)
        # An outcome of probability 0 contributes 0.
        divergence = np.sum(p * (log_p - np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))), axis=1)
        values.append(np.exp(divergence.mean()))
        weight = count / (len(parts) * len(divergence))  # all parts count equally, whatever their numbers of images
        influences.append(weight * values[-1] * (divergence - divergence.mean()))
    every = np.concatenate(influences)
    return Score(float(np.mean(values)), float(np.std(every) / np.sqrt(count)), float(np.std(values)), every)
