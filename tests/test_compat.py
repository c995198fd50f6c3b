"""The named codebases, against the DDIM authors' procedure in float64, and against the settings that each one fixes.

The tests in tests/peers compare with diffusers itself.
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
    """The noise that the sampler draws at each level, (T+1, N)."""
    draw = jax.vmap(lambda level: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level)))(KEYS))
    return np.array(draw(jnp.arange(T + 1)), np.float64)


def toy(xp, x, t):
    """A noise prediction for which some x̂_0 are outside [−1, 1] and others are inside."""
    return x * xp.tanh(t / 200) + 0.05 * xp.sin(5 * x + t)


def authors(num_steps, skip_type, eta, noisy):
    """Their loop over their list of t, 0 … T−1, with its repetitions. Returns the images and the length of the list."""
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
    """Our images, and the resolved arguments."""
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
    """Its list is kept: 50 'quad' steps visit 49 levels, one of them twice, and 300 'uniform' steps are 334."""
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


def test_arguments_that_a_codebase_does_not_fix_are_kept():
    assert compat.resolve('', T, **ASKED) | {'timesteps': 0} == ASKED | {'timesteps': 0, 'last_noise': False}
    np.testing.assert_array_equal(
        compat.resolve('', T, **ASKED)['timesteps'], schedule.timesteps(T, ASKED['num_steps'], 'linspace')
    )
    assert compat.resolve('ddim', T, **ASKED)['spacing'] == 'uniform'
    assert compat.resolve('diffusers', T, **ASKED)['spacing'] == 'linspace'
    assert compat.resolve('diffusers', T, **ASKED | {'spacing': 'quad'})['spacing'] == 'leading'


@pytest.mark.parametrize(
    ('variance', 'spacing', 'noisy'),
    [('large', 'trailing', True), ('large', 'leading', False), ('small', 'trailing', False)],
)
def test_diffusers_ddpm_adds_noise_at_the_end_above_level_1(variance, spacing, noisy):
    how = compat.resolve('diffusers', T, **ASKED | {'eta': 1.0, 'variance': variance, 'spacing': spacing})
    assert how['last_noise'] == noisy


@pytest.mark.parametrize('name', compat.COMPAT)
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_no_codebase_ends_up_with_the_large_variance_but_at_eta_1(name, eta):
    """Asked for by name, it is refused where no codebase replaces it; 'auto' never is."""
    how = compat.resolve(name, T, **ASKED | {'eta': eta, 'variance': 'auto'})
    assert how['variance'] == ('large' if how['eta'] == 1 and name != 'diffusers-ddim' else 'small')
    if name == '' and eta < 1:
        with pytest.raises(ValueError, match=f"belongs to eta=1, not to eta={eta:g}.*variance 'small'"):
            compat.resolve(name, T, **ASKED | {'eta': eta, 'variance': 'large'})
    else:
        assert compat.resolve(name, T, **ASKED | {'eta': eta, 'variance': 'large'})['eta'] in (eta, 1.0)


@pytest.mark.parametrize('eta', [0.0, 0.7])
def test_pairs_that_meet_are_a_chain(eta):
    levels = schedule.timesteps(T, 10)
    how = dict(shape=(), kind='eps', eta=eta)

    @jax.jit
    def program(keys):
        return [
            sampler.sample(keys, schedule.linear(T), lambda x, t: toy(jnp, x, t[0]), timesteps=steps, **how)
            for steps in (levels, np.stack([levels[:-1], levels[1:]], axis=1))
        ]

    np.testing.assert_array_equal(*program(KEYS))


def test_diffusers_ddim_steps_by_a_fixed_stride_and_ends_at_clean_data():
    """Its `prev_timestep` is t − T//S, and below 0 it takes ᾱ = 1 (`set_alpha_to_one`)."""
    pairs = compat.resolve('diffusers-ddim', T, **ASKED | {'num_steps': 4, 'spacing': 'leading'})['timesteps']
    assert pairs.tolist() == [[751, 501], [501, 251], [251, 1], [1, 0]]
    pairs = compat.resolve('diffusers-ddim', T, **ASKED | {'num_steps': 3, 'spacing': 'trailing'})['timesteps']
    assert pairs.tolist() == [[1000, 667], [667, 334], [333, 0]]


def test_a_codebase_added_to_the_table(monkeypatch):
    monkeypatch.setitem(compat.COMPAT, 'mine', lambda T, **asked: compat.ddim(T, **asked | {'num_steps': 5}))
    assert compat.resolve('mine', T, **ASKED)['timesteps'].tolist() == [801, 601, 401, 201, 1, 0]


@pytest.mark.parametrize(
    ('name', 'asked', 'words'),
    [
        ('Ho', {}, "compat is 'Ho', but must be one of '', 'diffusers', 'diffusers-ddim', 'ddim', 'ho'"),
        ('diffusers', dict(spacing='trailing', num_steps=61), 'timestep −1'),
        ('ddim', dict(num_steps=T + 1), 'num_steps is 1001'),
        ('ddim', dict(num_steps=1), 'level 1'),
    ],
)
def test_arguments_that_a_codebase_cannot_run_are_an_error(name, asked, words):
    with pytest.raises(ValueError, match=words):
        compat.resolve(name, T, **ASKED | asked)


@pytest.mark.parametrize('pairs', [[[5, 5]], [[5, 6]], [[T + 1, 4]], [[4, -1]], np.zeros((0, 2), int), [[3, 2, 1]]])
def test_invalid_pairs_are_an_error(pairs):
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
