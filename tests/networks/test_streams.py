"""Random streams against those of flax.nnx."""

import jax
import numpy as np
import pytest
from flax import nnx

from diffusion.networks import make_rngs


@pytest.mark.parametrize('streams', [{'default': 1}, {'default': 1, 'dropout': 2}])
def test_the_keys_are_those_of_nnx(streams):
    keys = {tag: jax.random.key(seed) for tag, seed in streams.items()}
    ours, theirs = make_rngs(**keys), nnx.Rngs(**keys)
    for name in ('params', 'dropout', 'params', 'dropout', 'dropout'):
        np.testing.assert_array_equal(*(jax.random.key_data(getattr(each, name)()) for each in (ours, theirs)))
    for key in [*ours.dropout.many(3), ours.dropout()]:
        np.testing.assert_array_equal(*(jax.random.key_data(each) for each in (key, theirs.dropout())))


def test_tracing_searches_no_earlier_operations(monkeypatch):
    """As nnx.Rngs does at each key, so that the time to trace a network grows with the square of its size."""
    searches = []
    frame = jax._src.interpreters.partial_eval.JaxprStackFrame
    monkeypatch.setattr(frame, 'find_progenitors', lambda self, tracer: searches.append(tracer) or (None, None))

    def draw(make):
        streams = make(default=jax.random.key(0))
        return [streams.params() for _ in range(3)]

    jax.eval_shape(lambda: draw(nnx.Rngs))
    if not searches:
        pytest.skip('nnx.Rngs searches no more, and can take the place of ours')
    searches.clear()
    jax.eval_shape(lambda: draw(make_rngs))
    assert not searches
