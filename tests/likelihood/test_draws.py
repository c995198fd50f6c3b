"""Draws with one key for the batch, and with a key for each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedule
from diffusion.likelihood import draws
from diffusion.likelihood.elbo import elbo
from tests.likelihood_oracles import QUICK

KEYS = jax.random.split(jax.random.key(0), 5)


def test_one_key_draws_as_jax_does():
    key = KEYS[0]
    np.testing.assert_array_equal(draws.normal(key, (3, 2)), jax.random.normal(key, (3, 2)))
    assert draws.split(key, 3)[2] == jax.random.split(key, 3)[2] and draws.fold_in(key, 7) == jax.random.fold_in(key, 7)


def test_an_image_with_its_own_key_draws_alone():
    """What JAX draws for that key, wherever the image is in the batch."""
    for draw in (
        lambda keys: draws.normal(draws.split(keys, 3)[2], (len(keys), 4)),
        lambda keys: draws.signs(draws.fold_in(keys, 7), (len(keys), 9)),
        lambda keys: draws.integers(keys, len(keys), 2, 1000),
    ):
        np.testing.assert_array_equal(draw(KEYS)[::-1], draw(KEYS[::-1]))
        assert len(np.unique(np.asarray(draw(KEYS)), axis=0)) == 5
    alone = jax.random.normal(jax.random.split(KEYS[2], 3)[2], (4,))
    np.testing.assert_array_equal(draws.normal(draws.split(KEYS, 3)[2], (5, 4))[2], alone)
    whole = draws.integers(KEYS, 5, 2, 1000)
    assert whole.dtype == jnp.int32 and whole.min() >= 2 and whole.max() < 1000


def test_as_many_keys_as_images():
    with pytest.raises(ValueError, match=r'keys of the shape \(5,\) for 4 images'):
        draws.normal(KEYS, (4, 2))


def test_the_terms_of_an_image_do_not_depend_on_the_others():
    """The transition form makes every kind of draw: levels, and several neighbours of a latent."""

    def program(keys, x0, sch):
        return elbo(keys, sch, lambda x_t, t: jnp.tanh(x_t), x0, kind='v', form='transition', levels=2)

    x0, sch = jnp.linspace(-0.9, 0.9, 15).reshape(5, 3), schedule.linear(6, 0.05, 0.5)
    program = jax.jit(program, compiler_options=QUICK)
    others = program(KEYS.at[:3].set(KEYS[4]), x0.at[:3].set(0.1), sch)
    for term, beside_others in zip(program(KEYS, x0, sch), others, strict=True):
        np.testing.assert_allclose(term[3:], beside_others[3:], rtol=1e-6)
        assert (np.asarray(term[:3]) != np.asarray(beside_others[:3])).any()
