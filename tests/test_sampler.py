"""The sampler against chains whose every moment is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import compat, gaussian, sampler, schedule
from diffusion.schedule import timesteps
from tests import oracles
from tests.jaxprs import equations
from tests.xla_flags import LONG

N, SHAPE = 1_000, (20,)  # most tests use these shapes, so that JAX compiles each primitive once
T = 200
SCH = schedule.linear(T, 5e-4, 0.1)
ALPHA_BAR = np.array([float(a) for a in oracles.alpha_bars(oracles.betas('linear', T, 5e-4, 0.1))])
DATA = oracles.GaussianData(mean=0.3, std=0.2, alpha_bar=ALPHA_BAR)


@functools.cache
def keys(n=N):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(n))


@functools.cache
def noise():
    return jax.random.normal(jax.random.key(1), (N, *SHAPE))


def sample(net, levels, kind, eta, sch=SCH, **how):
    """Draw images of shape `SHAPE`; short chains step by step, which compiles no loop, long ones as one program."""
    draw = functools.partial(
        sampler.sample, schedule=sch, net=net, shape=SHAPE, timesteps=levels, kind=kind, eta=eta, **how
    )
    if len(levels) > 50:
        return jax.jit(draw)(keys(), x_T=noise())
    with jax.disable_jit():
        return draw(keys())


def padded(steps, length):
    """The steps, followed by as many zeros as make each array so long."""
    return jax.tree.map(lambda values: np.pad(values, (0, length - len(values))), steps)


@functools.cache
def compiled(kind, eta):
    """Return draw(levels), which samples without clipping. One program serves chains of any number of steps."""

    def follow(keys, steps, num_steps):
        x_T = sampler.noise(keys, steps.t[0], SHAPE)
        how = dict(kind=kind, eta=eta, clip=False, x_T=x_T, rule='kernel')
        return sampler.follow(keys, SCH, DATA.net(kind), steps, num_steps, **how)

    program = jax.jit(follow, compiler_options=LONG)

    def draw(levels):
        steps = sampler.make_steps(SCH, levels, kind=kind, eta=eta)
        return program(keys(), padded(steps, T), len(steps.t))

    return draw


def assert_moments(samples, mean, var):
    """Within 4.5 standard errors of Gaussian samples: √(var/N) of the mean, var·√(2/N) of the variance."""
    samples = np.asarray(samples, np.float64)
    assert abs(samples.mean() - mean) < 4.5 * np.sqrt(var / samples.size) + 1e-5
    assert abs(samples.var() - var) < 4.5 * var * np.sqrt(2 / samples.size) + 1e-6


@pytest.mark.parametrize('kind', gaussian.KINDS)
@pytest.mark.parametrize('eta', [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    'num_steps, spacing', [(T, 'trailing'), (10, 'trailing'), (10, 'leading'), (20, 'linspace'), (8, 'quad')]
)
def test_moments_follow_the_exact_recursion(kind, eta, num_steps, spacing):
    levels = timesteps(T, num_steps, spacing)
    samples = compiled(kind, eta)(levels)
    assert samples.shape == (N, *SHAPE)
    assert_moments(samples, *DATA.sample_moments(levels, eta))


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_compiled_and_stepwise_samples_agree(eta):
    levels = timesteps(T, 10)
    expected = sample(DATA.net('v'), levels, 'v', eta, clip=False)
    np.testing.assert_allclose(compiled('v', eta)(levels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('num_steps', [10, T])
def test_large_variance_adds_no_noise_at_the_end(num_steps):
    levels = timesteps(T, num_steps)
    samples = sample(DATA.net('eps'), levels, 'eps', 1.0, variance='large', clip=False)
    mean, var = DATA.sample_moments(levels, 1.0, 'large')
    assert_moments(samples, mean, var)
    small = DATA.sample_moments(levels, 1.0)[1]
    noisy_end = var + 1 - ALPHA_BAR[levels[-2]]
    assert (abs(var / small - 1) > 0.01 and abs(noisy_end / var - 1) > 10 * np.sqrt(2 / samples.size)) or num_steps == T


def test_large_variance_adds_its_noise_at_the_end_if_asked():
    levels = timesteps(T, 10)
    samples = sample(DATA.net('eps'), levels, 'eps', 1.0, variance='large', clip=False, last_noise=True)
    mean, var = DATA.sample_moments(levels, 1.0, 'large')
    assert_moments(samples, mean, var + 1 - ALPHA_BAR[levels[-2]])


@pytest.mark.parametrize('eta', [0.0, *(pytest.param(eta, marks=pytest.mark.slow) for eta in (0.2, 0.5, 0.8)), 1.0])
def test_samples_of_gaussian_data_have_its_width(eta):
    """All 1,000 levels, as a config whose variance is 'auto' samples: N(0, 0.5²) comes out within 2 %."""
    alpha_bar = np.cumprod(np.append(1.0, 1 - np.linspace(1e-4, 0.02, 1000)))
    net = oracles.GaussianData(0.0, 0.5, alpha_bar).net('eps')
    how = compat.resolve('', 1000, num_steps=1000, spacing='trailing', eta=eta, variance='auto', clip=False)
    how = {key: how[key] for key in ('eta', 'variance', 'clip')}
    draw = functools.partial(sampler.sample, schedule=schedule.linear(1000), net=net, shape=SHAPE, kind='eps', **how)
    program = jax.jit(lambda keys: draw(keys, timesteps=np.arange(1000, -1, -1)), compiler_options=LONG)
    samples = program(keys())
    assert np.std(samples) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize('eta', [0.0, 0.5])
def test_variances_given_as_an_array(eta):
    levels = timesteps(T, 6)
    variance = np.array([0.3, 0.05, 0, 0.01, 0.1, 0.4])  # a step without noise among them
    samples = sample(DATA.net('v'), levels, 'v', eta, variance=variance, clip=False)
    assert_moments(samples, *DATA.sample_moments(levels, eta, variance))


@pytest.mark.parametrize('name', sorted(schedule.SCHEDULES))
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_a_point_mass_is_sampled_exactly(name, eta):
    """Whatever the chain does, its last step returns the x_0 that the network knows."""
    alpha_bar = np.array([float(a) for a in oracles.alpha_bars(oracles.betas(name, 50))])
    net = oracles.PointMass(0.7, alpha_bar).net('x0')
    samples = sample(net, timesteps(50, 7), 'x0', eta, schedule.SCHEDULES[name](50))
    np.testing.assert_array_equal(samples, np.float32(0.7))


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_a_point_mass_is_at_the_right_level_after_every_step(eta):
    """After every step x_s is distributed as q(x_s | x_0): the coefficients are those of the next level."""
    seen = []

    def net(x_t, t):
        seen.append((int(t[0]), np.asarray(x_t, np.float64)))
        return jnp.full_like(x_t, 0.7)

    sample(net, timesteps(20, 5), 'x0', eta, schedule.jsd(20), x_T=noise())  # q(x_T|x_0): ᾱ_T = 0 exactly
    assert [t for t, _ in seen] == [20, 16, 12, 8, 4]
    for t, x_t in seen:
        assert_moments(x_t, np.sqrt(1 - t / 20) * 0.7, t / 20)


def test_every_level_is_visited_once_with_its_own_index():
    levels = timesteps(1000, 10, 'linspace')
    seen = []

    def net(x_t, t):
        seen.append(np.asarray(t))
        return jnp.zeros_like(x_t)

    sample(net, levels, 'v', 0.0, schedule.linear(1000))
    np.testing.assert_array_equal(seen, np.repeat(levels[:-1, None], N, axis=1))


def bits_drawn(eta, x_T=None, **how):
    """Primitives of the program that draw random bits, in the loop and before it."""
    levels = timesteps(T, 10)

    def program(keys, x_T):
        return sampler.sample(
            keys, SCH, DATA.net('eps'), shape=(4,), timesteps=levels, kind='eps', eta=eta, x_T=x_T, **how
        )

    found = [
        (equation.primitive.name, 'scan' in inside)
        for equation, inside in equations(jax.make_jaxpr(program)(keys(5), x_T).jaxpr)
    ]
    assert any(in_loop for _, in_loop in found)
    return [in_loop for name, in_loop in found if name.startswith('random_') or name.startswith('threefry')]


def test_ddim_draws_no_noise_after_the_first():
    assert not any(bits_drawn(0.0)) and bits_drawn(0.0)
    assert not bits_drawn(0.0, x_T=jnp.zeros((5, 4)))
    assert any(bits_drawn(1.0)) and any(bits_drawn(0.25))
    assert any(bits_drawn(0.0, variance=np.full(10, 0.1)))


def test_the_program_does_not_grow_with_the_number_of_steps():
    def size(num_steps):
        program = functools.partial(
            sampler.sample,
            schedule=SCH,
            net=DATA.net('eps'),
            shape=(4,),
            timesteps=timesteps(T, num_steps),
            kind='eps',
            eta=1.0,
        )
        return jax.jit(program).lower(keys(5)).as_text().count('\n')

    assert size(T) == size(10)


@pytest.mark.slow
@pytest.mark.parametrize(('eta', 'variance'), [(0.5, 'small'), (1.0, 'large')])
def test_one_program_serves_chains_of_any_number_of_steps(eta, variance):
    """It is given the longest chain and how many steps to take."""
    how = dict(kind='eps', eta=eta)

    def draw(steps, num_steps):
        return sampler.follow(
            keys(), SCH, DATA.net('eps'), steps, num_steps, clip=True, x_T=noise(), rule='kernel', **how
        )

    program = None
    for num_steps in (3, 6):
        levels = timesteps(T, num_steps)
        steps = sampler.make_steps(SCH, levels, variance=variance, **how)
        expected = sample(DATA.net('eps'), levels, x_T=noise(), variance=variance, **how)
        longest = padded(steps, 6)
        program = program or jax.jit(draw).lower(longest, num_steps).compile()
        np.testing.assert_allclose(program(longest, num_steps), expected, rtol=0, atol=1e-5)


def test_an_image_depends_on_its_key_alone():
    @jax.jit
    def draw(keys):
        net = DATA.net('eps')
        return sampler.sample(keys, SCH, net, shape=(3, 3, 1), timesteps=timesteps(T, 10), kind='eps', eta=1.0)

    many = draw(keys()[:1000])
    np.testing.assert_array_equal(many[:7], draw(keys()[:7]))
    np.testing.assert_array_equal(many[::-1], draw(keys()[:1000][::-1]))
    assert len(np.unique(np.asarray(many)[:, 0, 0, 0])) == 1000


def test_no_noise_is_used_twice():
    """With x̂_0 = 0 and η = 1 a step is x_s = A·x_t + σ·z: the z's of all levels and pixels are uncorrelated."""
    xs = []

    def net(x_t, t):
        xs.append(np.asarray(x_t, np.float64))
        return jnp.zeros_like(x_t)

    levels = timesteps(T, 4)
    sample(net, levels, 'x0', 1.0)
    noises = [xs[0]]
    for before, after, t, s in zip(xs[:-1], xs[1:], levels[:-2], levels[1:-1], strict=True):
        a_t, a_s = ALPHA_BAR[[t, s]]
        sigma = np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        noises.append((after - np.sqrt(1 - a_s - sigma**2) * before / np.sqrt(1 - a_t)) / sigma)
    correlation = np.corrcoef(np.concatenate(noises, axis=1), rowvar=False)
    assert np.abs(correlation - np.eye(correlation.shape[0])).max() < 5 / np.sqrt(N)


def test_clipping_is_on_and_can_be_turned_off():
    def draw(**clip):
        return sample(lambda x_t, t: jnp.full_like(x_t, 3.0), timesteps(T, 10), 'x0', 0.0, **clip)

    np.testing.assert_array_equal(draw(), 1)
    np.testing.assert_array_equal(draw(clip=True), 1)
    np.testing.assert_array_equal(draw(clip=False), 3)


# Rules.


def test_a_rule_carries_its_state(monkeypatch):
    """A rule that remembers x_T and the levels it came through returns them at the end."""

    def step(state, x_t, t, s, std, *, schedule, predict, noise, eta):
        x_T, path = state
        path = 1000 * path + t
        return (x_T, path), jnp.where(s == 0, x_T + path, jnp.nan)

    monkeypatch.setitem(sampler.RULES, 'memory', sampler.Rule(lambda x_T: (x_T, 0), step))
    x_T = jnp.arange(2.0)
    how = dict(shape=(), timesteps=[7, 3, 0], kind='eps', eta=1.0, x_T=x_T, rule='memory')
    np.testing.assert_array_equal(sampler.sample(keys(2), SCH, None, **how), x_T + 7003)


def test_a_rule_may_ask_the_network_twice(monkeypatch):
    """A rule that takes every step in two halves draws the images of the chain with twice as many steps."""

    def step(state, x_t, t, s, std, *, schedule, predict, noise, eta):
        for start, end in ((t, (s + t) // 2), ((s + t) // 2, s)):
            mean, kernel_std = gaussian.posterior(schedule, predict(x_t, start), end, start, eta=eta)
            x_t = mean + kernel_std * noise(end)
        return state, x_t

    monkeypatch.setitem(sampler.RULES, 'halves', sampler.Rule(lambda x_T: None, step))
    halves = sample(DATA.net('v'), timesteps(T, 5), 'v', 0.5, rule='halves')
    np.testing.assert_allclose(halves, sample(DATA.net('v'), timesteps(T, 10), 'v', 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize(('variance', 'expected'), [('small', [None, None]), (np.array([4.0, 9.0]), [2.0, 0.0])])
def test_a_rule_is_given_the_standard_deviations_asked_for(monkeypatch, variance, expected):
    """One for each pair, none with the variance of the rule itself, and 0 at the end."""
    seen = []

    def step(state, x_t, t, s, std, **_):
        seen.append(std)
        return state, x_t

    monkeypatch.setitem(sampler.RULES, 'listener', sampler.Rule(lambda x_T: (), step))
    sample(None, [7, 3, 0], 'v', 0.5, variance=variance, rule='listener')
    assert seen == expected


def test_a_kind_added_to_the_table_is_sampled(monkeypatch):
    """The score −ε/√(1−ᾱ_t): a chain of a network that outputs it has the moments of any other kind."""
    score = gaussian.Kind(
        target=lambda signal, noise, x0, eps: -eps / noise,
        predict=lambda signal, noise, output, x_t: gaussian.Prediction(
            (x_t + noise**2 * output) / signal, -noise * output
        ),
    )
    monkeypatch.setitem(gaussian.KINDS, 'score', score)
    levels = timesteps(T, 10)

    def net(x_t, t):
        return -DATA.net('eps')(x_t, t) / jnp.sqrt(1 - jnp.asarray(ALPHA_BAR, jnp.float32))[t][:, None]

    assert_moments(sample(net, levels, 'score', 0.5, clip=False), *DATA.sample_moments(levels, 0.5))


@pytest.mark.parametrize('wrong', [jax.random.key(0), jax.random.PRNGKey(0)], ids=['one alone', 'not typed'])
def test_keys_are_typed_and_there_is_one_for_each_image(wrong):
    how = dict(shape=(), timesteps=timesteps(T, 5), kind='eps', eta=1.0)
    with pytest.raises(ValueError, match='one typed key an image'):
        sampler.sample(wrong, SCH, DATA.net('eps'), **how)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'timesteps': [5, 3, 1]}, 'decrease to 0'),
        ({'timesteps': [5, 5, 0]}, 'decrease to 0'),
        ({'timesteps': [0]}, 'decrease to 0'),
        ({'timesteps': [T + 1, 0]}, 'levels lie in'),
        ({'variance': 'huge'}, "'small', 'large'"),
        ({'variance': np.ones(3)}, 'shape'),
        ({'variance': np.array([1, 1, -1, 1, 1])}, 'not negative'),
        ({'variance': np.array([1, 1, np.nan, 1, 1])}, 'finite'),
        ({'variance': 'large', 'eta': 0.0}, 'eta=0'),
        ({'variance': 'large', 'eta': 0.5}, "eta=1, not to eta=0.5.*variance 'small'"),
        ({'eta': 1.5}, 'eta'),
        ({'rule': 'heun'}, "rule is 'heun', but must be one of kernel"),
        ({'schedule': schedule.jsd(T), 'timesteps': timesteps(T, 5)}, "'x0' or 'v'"),
    ],
)
def test_invalid_arguments_are_an_error(change, message):
    how = dict(schedule=SCH, net=DATA.net('eps'), shape=(), timesteps=timesteps(T, 5), kind='eps', eta=1.0)
    with pytest.raises(ValueError, match=message):
        sampler.sample(keys(2), **(how | change))
    if 'schedule' in change:  # inside a jitted program as well
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda k: sampler.sample(k, **(how | change)))(keys(2))
