"""The named modes, against the DDIM authors' procedure written out in float64, and against what each is said to fix.

diffusers itself is asked in tests/peers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import compat, sampler, schedule

T, N = 1000, 64
ASKED = dict(num_steps=10, spacing='linspace', eta=0.5, variance='small', clip=True)
KEYS = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(N))


@functools.cache
def noises():
    """What the sampler draws at each level, (T+1, N)."""
    draw = jax.vmap(lambda level: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level)))(KEYS))
    return np.array(draw(jnp.arange(T + 1)), np.float64)


def toy(xp, x, t):
    """A noise prediction with which some x̂_0 leave [−1, 1], and others do not."""
    return x * xp.tanh(t / 200) + 0.05 * xp.sin(5 * x + t)


def authors(num_steps, skip_type, eta, noisy):
    """Their loop over their list of t, 0 … T−1, repetitions and all. Returns the images and how many t there were."""
    if skip_type == 'uniform':
        visits = list(range(0, T, T // num_steps))
    else:
        visits = [int(u) for u in np.linspace(0, np.sqrt(T * 0.8), num_steps) ** 2]
    a = np.cumprod(1 - np.concatenate([[0], np.linspace(1e-4, 0.02, T)]))  # a[t + 1] is theirs at t
    x = noises()[visits[-1] + 1]
    for t, following in zip(reversed(visits), reversed([-1, *visits[:-1]]), strict=True):
        now, then, z, e = a[t + 1], a[following + 1], noises()[following + 1], toy(np, x, t + 1)
        if noisy:
            x0 = np.clip(np.sqrt(1 / now) * x - np.sqrt(1 / now - 1) * e, -1, 1)
            beta = 1 - now / then
            mean = (np.sqrt(then) * beta * x0 + np.sqrt(1 - beta) * (1 - then) * x) / (1 - now)
            x = mean + np.sqrt(beta) * z * (t > 0)
        else:
            x0 = (x - np.sqrt(1 - now) * e) / np.sqrt(now)
            sigma = eta * np.sqrt((1 - now / then) * (1 - then) / (1 - now))
            x = np.sqrt(then) * x0 + np.sqrt(1 - then - sigma**2) * e + sigma * z
    return x, len(visits)


def draw(asked_compat, **asked):
    """Our images, and what was resolved."""
    how = compat.resolve(asked_compat, T, **ASKED | asked)
    done = {key: how.pop(key) for key in ('num_steps', 'spacing')}
    net = lambda x, t: toy(jnp, x, t[0])  # noqa: E731
    images = jax.jit(lambda keys: sampler.sample(keys, schedule.linear(T), net, shape=(), kind='eps', **how))(KEYS)
    return np.asarray(images), how | done


@pytest.mark.parametrize(
    ('num_steps', 'spacing', 'eta', 'variance', 'visited', 'distinct'),
    [
        (50, 'quad', 0.0, 'small', 50, 49),
        (100, 'quad', 0.3, 'large', 100, 96),
        (100, 'quad', 1.0, 'large', 100, 96),
        (300, 'uniform', 1.0, 'small', 334, 334),
        (10, 'uniform', 1.0, 'large', 10, 10),
    ],
)
def test_the_ddim_code(num_steps, spacing, eta, variance, visited, distinct):
    """Its list as it is: 50 'quad' steps visit 49 levels, one of them twice, and 300 'uniform' ones are 334."""
    theirs, count = authors(num_steps, spacing, eta, noisy=variance == 'large' and eta == 1)
    ours, how = draw('ddim', num_steps=num_steps, spacing=spacing, eta=eta, variance=variance)
    assert (count, how['num_steps'], len(how['timesteps']) - 1) == (visited, distinct, distinct)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.1


def test_ho_takes_all_levels_with_the_large_variance():
    images, how = draw('ho')
    np.testing.assert_array_equal(how['timesteps'], np.arange(T, -1, -1))
    theirs, _ = authors(T, 'uniform', 1.0, noisy=True)
    np.testing.assert_allclose(images, theirs, rtol=0, atol=1e-4)


def test_what_is_not_fixed_is_as_asked():
    assert compat.resolve('', T, **ASKED) | {'timesteps': 0} == ASKED | {'timesteps': 0, 'last_noise': False}
    np.testing.assert_array_equal(
        compat.resolve('', T, **ASKED)['timesteps'], schedule.timesteps(T, ASKED['num_steps'], 'linspace')
    )
    assert compat.resolve('ddim', T, **ASKED)['spacing'] == 'uniform'
    assert compat.resolve('diffusers', T, **ASKED)['spacing'] == 'linspace'
    assert compat.resolve('diffusers', T, **ASKED | {'spacing': 'quad'})['spacing'] == 'leading'


def test_pairs_of_steps_that_are_a_chain_are_that_chain():
    levels = schedule.timesteps(T, 10)
    for eta in (0.0, 0.7):
        images = [
            sampler.sample(
                KEYS,
                schedule.linear(T),
                lambda x, t: toy(jnp, x, t[0]),
                shape=(),
                timesteps=steps,
                kind='eps',
                eta=eta,
            )
            for steps in (levels, np.stack([levels[:-1], levels[1:]], axis=1))
        ]
        np.testing.assert_array_equal(*images)


@pytest.mark.parametrize(
    ('name', 'asked', 'words'),
    [
        ('Ho', {}, "'Ho'"),
        ('diffusers', dict(spacing='trailing', num_steps=61), 'timestep −1'),
        ('ddim', dict(num_steps=T + 1), 'num_steps is 1001'),
        ('ddim', dict(num_steps=1), 'level 1'),
    ],
)
def test_what_cannot_be_followed_is_refused(name, asked, words):
    with pytest.raises(ValueError, match=words):
        compat.resolve(name, T, **ASKED | asked)


@pytest.mark.parametrize('pairs', [[[5, 5]], [[5, 6]], [[T + 1, 4]], [[4, -1]], np.zeros((0, 2), int), [[3, 2, 1]]])
def test_pairs_that_are_none_are_refused(pairs):
    with pytest.raises(ValueError, match=r'pairs|noise levels'):
        sampler.sample(
            KEYS,
            schedule.linear(T),
            lambda x, t: x,
            shape=(),
            timesteps=np.asarray(pairs),
            kind='eps',
            eta=0.0,
        )
