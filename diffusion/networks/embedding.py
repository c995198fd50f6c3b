"""Embeddings of noise levels and classes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

Embedding = Float[Array, 'B E']


def time_embedding(
    t: Num[Array, 'B'], dim: int, embedding_order: str = 'sin_cos', embedding_shift: int = 1
) -> Float[Array, 'B dim']:
    """Embed noise levels: sin(t·ωᵢ) ‖ cos(t·ωᵢ) with ωᵢ = 10000^(−i/(dim/2−shift)) (Vaswani et al. 2017, §3.5).

    Args:
        t: noise levels, integer or real.
        dim: even, at least 4.
        embedding_order: which half comes first, 'sin_cos' or 'cos_sin'.
        embedding_shift: 1, with which the last frequency is 1/10000, or 0.

    Returns:
        Values in [−1, 1], float32.
    """
    angles = t.astype(jnp.float32)[:, None] * _frequencies(dim, embedding_shift)
    halves = {'sin': jnp.sin(angles), 'cos': jnp.cos(angles)}
    return jnp.concatenate([halves[name] for name in embedding_order.split('_')], axis=1)


def _frequencies(dim, shift):
    half = dim // 2
    return jnp.exp(-math.log(10_000) / (half - shift) * jnp.arange(half, dtype=jnp.float32))


def advance(
    kernel: Float[np.ndarray, 'dim features'], embedding_order: str = 'sin_cos', embedding_shift: int = 1
) -> Float[np.ndarray, 'dim features']:
    """Change the linear layer after `time_embedding` so that it returns at t what it returned at t + 1.

        sin((t+1)ω) = sin tω·cos ω + cos tω·sin ω,    cos((t+1)ω) = cos tω·cos ω − sin tω·sin ω

    Args:
        kernel: the layer's matrix.
        embedding_order: see `time_embedding`.
        embedding_shift: see `time_embedding`.

    Returns:
        The new matrix, float32, computed in float64.
    """
    angles = np.asarray(_frequencies(len(kernel), embedding_shift), np.float64)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    names = embedding_order.split('_')
    rows = dict(zip(names, np.split(np.asarray(kernel, np.float64), 2), strict=True))
    later = {'sin': cos * rows['sin'] - sin * rows['cos'], 'cos': sin * rows['sin'] + cos * rows['cos']}
    return np.concatenate([later[name] for name in names]).astype(np.float32)


class Label(nnx.Linear):
    """The embedding of classes, (B,) → (B, E). The last row is that of −1, no class.

    It is a matrix product, because GPUs do not fix the order in which the gradient of a lookup is summed.
    """

    def __init__(self, num_classes: int, emb_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, std: float = 1.0):
        init = nnx.initializers.normal(std)
        super().__init__(num_classes + 1, emb_dim, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, labels: Int[Array, 'B']) -> Embedding:  # type: ignore[override]
        return super().__call__(jax.nn.one_hot(labels % self.in_features, self.in_features))
