"""What feature networks are made of, by loops over windows."""

import jax.numpy as jnp
import numpy as np

from diffusion.metrics import layers

X = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)


def windows(function):
    """A function of the pixels within one step of each pixel, of those that exist."""
    rows = []
    for i in range(5):
        near = (X[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] for j in range(4))
        rows.append([function(part, axis=(1, 2)) for part in near])
    return np.array(rows).transpose(2, 0, 1, 3)


def test_averages_at_the_border_are_of_the_pixels_that_exist():
    np.testing.assert_allclose(layers.average_pool(jnp.asarray(X)), windows(np.mean), atol=1e-6)


def test_maxima_are_of_each_window():
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(X), stride=1, padding='SAME'), windows(np.max))
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(X)), windows(np.max)[:, 1:-1:2, 1:-1:2])


def test_a_folded_batch_norm_is_that_of_its_equation():
    rng = np.random.default_rng(1)
    weight, mean, bias, scale = rng.normal(size=(6, 3, 1, 1)), *rng.normal(size=(3, 6))
    norm = dict(weight=scale, bias=bias, running_mean=mean, running_var=rng.uniform(0, 0.01, size=6))
    params = {'conv': layers.fold(weight, norm)}
    found = layers.apply_conv(params, lambda x: x, 'conv', jnp.asarray(X), 6, 1)
    normed = (X @ weight[:, :, 0, 0].T - mean) / np.sqrt(norm['running_var'] + 1e-3)
    np.testing.assert_allclose(found, normed * scale + bias, rtol=1e-4, atol=1e-4)
