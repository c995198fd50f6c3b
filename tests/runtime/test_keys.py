"""Random keys by domain."""

import jax
import numpy as np
import pytest

from diffusion.runtime.keys import DOMAINS, domain_key


def test_no_two_domains_or_seeds_share_a_key():
    keys = [jax.random.key_data(domain_key(seed, domain)) for seed in range(5) for domain in DOMAINS]
    roots = [jax.random.key_data(jax.random.key(seed, impl='threefry2x32')) for seed in range(5)]
    assert len({tuple(np.asarray(key)) for key in [*keys, *roots]}) == 5 * len(DOMAINS) + 5


def test_jaxs_default_generator_does_not_matter():
    key = domain_key(3, 'noise')
    with jax.default_prng_impl('rbg'):
        other = domain_key(3, 'noise')
    assert key == other and str(jax.random.key_impl(key)) == 'threefry2x32'


def test_an_unknown_domain_is_refused():
    with pytest.raises(ValueError, match=r"domain is 'noises', but must be one of init, .*noise, .*likelihood"):
        domain_key(0, 'noises')
