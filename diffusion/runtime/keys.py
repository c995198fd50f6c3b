"""Random keys: one domain for each purpose, so that equal seeds never share a draw."""

import jax

# A domain's position is part of its key. data.Order draws batches with NumPy.
DOMAINS = ('init', 'noise', 'dropout', 'flips', 'sampling', 'likelihood', 'labels')


def domain_key(seed: int | jax.Array, domain: str) -> jax.Array:
    """Return the random key of one purpose: fold_in(key(seed), index of the domain).

    The generator is pinned: JAX's default is a setting, and a resumed run must draw the same numbers.

    Args:
        seed: an integer. JAX uses its lower 32 bits. Different domains give independent keys for equal seeds.
        domain: an entry of DOMAINS.

    Returns:
        A typed key of shape ().

    Raises:
        ValueError: `domain` is not in DOMAINS.
    """
    if domain not in DOMAINS:
        raise ValueError(f'domain is {domain!r}, but must be one of {", ".join(DOMAINS)}')
    return jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), DOMAINS.index(domain))
