"""The training step against arithmetic by hand, and the loop around it, in one process."""

import contextlib
import dataclasses
import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import build, data, schedule
from diffusion.build import Experiment
from diffusion.modes import train
from diffusion.networks import plain
from diffusion.runtime import memory, mesh
from diffusion.util import RunError
from tests.runs import quick, random_params, tiny
from tests.xla_flags import QUICK

# Networks whose gradients are known.


class Pixels:
    """Returns its parameters, whatever its input. For kind 'x0' the gradient at 0 is then a multiple of x_0."""

    def __init__(self, *shape):
        self.shape = shape

    def init(self, key):
        return {'answer': jnp.zeros(self.shape)}

    def net(self, params, *, dropout_key=None):
        return lambda x_t, t: jnp.broadcast_to(params['answer'], x_t.shape)


class Affine:
    """scale·x_t + shift + noise, where the noise takes the place of dropout."""

    def init(self, key):
        return {'shift': 0.3 * jax.random.normal(key, (8, 8, 1)), 'scale': jnp.float32(-0.5)}

    def net(self, params, *, dropout_key=None):
        assert dropout_key is not None  # dropout is on in training
        return lambda x_t, t: params['scale'] * x_t + params['shift'] + 0.1 * jax.random.normal(dropout_key, x_t.shape)


def keep_gradient():
    """An optimizer that changes nothing, and whose state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


SCHEDULE = schedule.linear(4, 0.1, 0.5)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
FLOATS = IMAGES.astype(np.float32)  # `train_step` reads them as it reads bytes, and they may be NaN
BAD = np.full_like(FLOATS, np.nan)


def experiment_of(network, optimizer=None, learning_rate=lambda updates: 0.1):
    return Experiment(SCHEDULE, network, optimizer or keep_gradient(), learning_rate, mesh.make_mesh(), plain)


def stepper(exp, *, seed=0, kind='eps', ema_decay=0.9, flip=False):
    """(state, images, indices) → (state, metrics), compiled; nothing is donated."""
    how = dict(exp=exp, seed=seed, kind=kind, weighting='simple', ema_decay=ema_decay, flip=flip)
    return functools.partial(train.train_step, **how)


@functools.cache
def gradient_stepper(seed):
    return stepper(experiment_of(Affine()), seed=seed)


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def indices_of(step, batch_size=16):
    return np.random.default_rng(step).integers(0, len(IMAGES), batch_size, dtype=np.int32)


def host(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def run_by_hand(*, grad_clip, warmup_steps, bad=(), learning_rate=1e-2):
    """Eight steps of train_step, and beside each the Adam of Kingma & Ba 2014, Algorithm 1, in float64.

    Each gradient comes from the same train_step, with an optimizer that keeps it. The images of the steps `bad` are
    NaN; by hand, they are no updates.

    Returns:
        (parameters by train_step, by hand) after each step, and the metrics of each step with the expected ones.
    """
    config = tiny(
        {'train.grad_clip': grad_clip, 'train.learning_rate': learning_rate, 'train.warmup_steps': warmup_steps}
    ).train
    optimizer, rate = build.make_optimizer(config)
    exp = experiment_of(Affine(), optimizer, rate)
    step_fn, gradient_fn = stepper(exp), gradient_stepper(0)
    state = exp.init(jax.random.key(1))
    by_hand = host(state.params)
    m = v = jax.tree.map(np.zeros_like, by_hand)
    both, metrics, updates = [], [], 0
    for k in range(8):
        indices, images = indices_of(k), BAD if k in bad else FLOATS
        kept, _ = gradient_fn(dataclasses.replace(state, opt_state=state.params), FLOATS, indices)
        gradient = host(kept.opt_state)
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        lr = learning_rate * min(1, (updates + 1) / warmup_steps) if warmup_steps else learning_rate
        if k not in bad:
            updates += 1
            factor = min(1, grad_clip / norm) if grad_clip else 1
            clipped = jax.tree.map(lambda g, factor=factor: g * factor, gradient)
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, clipped)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, clipped)
            by_hand = jax.tree.map(
                lambda p, m, v, n=updates, lr=lr: p - lr * m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8),
                by_hand,
                m,
                v,
            )
        state, logged = step_fn(state, images, indices)
        both.append((host(state.params), by_hand))
        metrics.append(host(logged) | {'norm': norm, 'lr': lr})
    assert int(state.step) == 8
    return both, metrics


@pytest.mark.parametrize(
    ('grad_clip', 'warmup_steps', 'bad'),
    [
        pytest.param(0.1, 4, (), marks=pytest.mark.slow),
        (0.1, 4, (0, 2, 3)),
        pytest.param(0.0, 0, (), marks=pytest.mark.slow),
    ],
    ids=['clip and warm-up', 'clip, warm-up and skipped steps', 'neither'],
)
def test_a_step_is_adam_after_clipping_and_a_skipped_step_is_no_update(grad_clip, warmup_steps, bad):
    """The learning rate and Adam's bias correction count updates; the logged rate is the one that is used."""
    both, metrics = run_by_hand(grad_clip=grad_clip, warmup_steps=warmup_steps, bad=bad)
    norms = [m['norm'] for m in metrics]
    assert min(norms) > 0.1 and max(norms) > 1.2 * min(norms)  # else the clip would change no update of Adam
    for ours, by_hand in both:
        for name in ours:
            np.testing.assert_allclose(ours[name], by_hand[name], rtol=0, atol=2e-6)
    good = [m for k, m in enumerate(metrics) if k not in bad]
    np.testing.assert_allclose([m['grad_norm'] for m in good], [m['norm'] for m in good], rtol=1e-5)  # before the clip
    np.testing.assert_allclose([m['learning_rate'] for m in good], [m['lr'] for m in good], rtol=1e-6)


def test_the_average_follows_the_new_parameters():
    """ē ← d·ē + (1−d)·θ with d = min(decay, (1+k)/(10+k)), θ the parameters after step k (FIELD.md 2.13)."""
    exp = experiment_of(Affine(), optax.sgd(1.0))
    step_fn = stepper(exp, ema_decay=0.5)
    state = exp.init(jax.random.key(1))
    average = host(state.ema)
    assert all((average[name] == host(state.params)[name]).all() for name in average)
    for k in range(16):  # from k = 8 on the decay is 0.5
        state, _ = step_fn(state, IMAGES, indices_of(k))
        decay = min(0.5, (1 + k) / (10 + k))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, host(state.params))
        for name in average:
            np.testing.assert_allclose(host(state.ema)[name], average[name], rtol=0, atol=2e-6)
    assert max(np.abs(average[name] - host(state.params)[name]).max() for name in average) > 1e-2


def test_without_decay_the_average_is_the_parameters():
    exp = experiment_of(Affine(), optax.sgd(1.0))
    state, _ = stepper(exp, ema_decay=0.0)(exp.init(jax.random.key(1)), IMAGES, indices_of(0))
    assert all((state.ema[name] == state.params[name]).all() for name in state.params)


def clean_images(*, flip, step=0, indices):
    """The x_0 of a step: the gradient of the mean squared error is −2·x_0/size where the network returns 0."""
    exp = experiment_of(Pixels(len(indices), 8, 8, 1))
    state = at_step(exp.init(jax.random.key(0)), step)
    state, _ = stepper(exp, kind='x0', flip=flip)(state, IMAGES, indices)
    gradient = np.asarray(state.opt_state['answer'])
    return gradient * (-gradient.size / 2)


def test_flips_mirror_about_half_of_the_images_and_leave_the_rest():
    indices = indices_of(0, 400)
    expected = data.to_float(IMAGES[indices])
    np.testing.assert_allclose(clean_images(flip=False, indices=indices), expected, atol=1e-5)
    mirrored = []
    for step in (0, 1):
        x0 = clean_images(flip=True, step=step, indices=indices)
        is_unchanged = np.abs(x0 - expected).max((1, 2, 3)) < 1e-5
        is_mirrored = np.abs(x0 - expected[:, :, ::-1]).max((1, 2, 3)) < 1e-5
        assert (is_unchanged ^ is_mirrored).all()
        assert abs(is_mirrored.sum() - 200) < 5 * 10  # five standard deviations
        mirrored.append(is_mirrored)
    assert 0.3 < np.mean(mirrored[0] == mirrored[1]) < 0.7


def test_a_step_draws_from_seed_and_step_alone():
    start = experiment_of(Affine()).init(jax.random.key(1))
    losses = []
    for seed in (0, 1):
        for step in (0, 1, 2, 0):
            _, metrics = gradient_stepper(seed)(at_step(start, step), FLOATS, indices_of(0))
            losses.append(float(metrics['loss']))
    assert losses[3] == losses[0] and losses[7] == losses[4]
    assert len(set(losses)) == 6


@pytest.mark.slow
def test_a_step_uses_no_key_twice():
    """Flips, levels, noise and dropout are drawn from different keys."""
    exp = experiment_of(Affine())
    state = exp.init(jax.random.key(1))
    with jax.debug_key_reuse(True):
        stepper(exp, flip=True)(state, IMAGES, indices_of(0))


def test_the_state_holds_no_random_keys():
    """They follow from (seed, step), with dropout as well."""
    state = build.build(tiny({'model.dropout': 0.5})).abstract_state()
    assert sorted(vars(state)) == ['ema', 'history', 'opt_state', 'params', 'skipped', 'step'] and state.history is None
    for leaf in jax.tree.leaves((state.params, state.ema)):
        assert leaf.dtype == jnp.float32
    for leaf in jax.tree.leaves((state.step, state.opt_state, state.skipped)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    integers = [leaf for leaf in jax.tree.leaves((state.opt_state, state.skipped)) if leaf.dtype == jnp.int32]
    assert all(leaf.shape == () for leaf in integers)  # counters


def test_a_bad_step_changes_nothing_but_the_counts():
    """NaN in the images of the second and third of four steps: what is kept is the state after the first."""
    exp = experiment_of(Pixels(8, 8, 1), optax.adam(1.0))
    step = stepper(exp, kind='x0')
    indices = jnp.arange(4)
    once, _ = step(exp.init(jax.random.key(0)), FLOATS, indices)
    state = once
    for n in (1, 2):
        state, metrics = step(state, BAD, indices)
        assert not np.isfinite(float(metrics['loss'])) and int(state.step) == 1 + n
        assert (int(metrics['skipped']), int(metrics['skipped_in_a_row'])) == (n, n)
    for name in ('params', 'ema', 'opt_state'):
        for kept, before in zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, once)), strict=True):
            np.testing.assert_array_equal(kept, before)
    state, metrics = step(state, FLOATS, indices)
    assert (int(metrics['skipped']), int(metrics['skipped_in_a_row'])) == (2, 0)
    assert not np.array_equal(state.params['answer'], once.params['answer'])


def place(exp, config):
    """The arguments of `train.compile_step`, on the devices as `train.run` puts them."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, exp.abstract_state())
    # The initial parameters are computed once, so a quick compilation is worth more than a fast program.
    init = jax.jit(exp.init, out_shardings=shardings, compiler_options={'xla_backend_optimization_level': 0})
    return (
        init(jax.random.key(0)),
        jax.device_put(IMAGES, mesh.replicated(exp.mesh)),
        jax.device_put(np.arange(config.train.batch_size, dtype=np.int32), mesh.split_batch(exp.mesh)),
    )


def test_the_new_state_reuses_the_buffers_of_the_old_one():
    config = tiny()
    exp = experiment_of(Affine(), optax.adam(1.0))
    old, images, indices = place(exp, config)
    new, _ = train.compile_step(config, exp, old, images, indices)(old, images, indices)
    assert int(new.step) == 1
    for leaf in jax.tree.leaves((old.params, old.ema, old.opt_state)):
        assert leaf.is_deleted()
    assert not images.is_deleted()


@pytest.mark.slow
def test_one_batch_can_be_learned():
    """By the U-Net and the loss of training, with new levels and noise at each step, so that no draw is memorized.

    x_0 is one of four images, so ε can be inferred from x_t.
    """
    config = tiny({'model.channels': 16, 'train.batch_size': 4, 'train.warmup_steps': 10, 'train.ema_decay': 0.98})
    exp = build.build(config)
    state, _, indices = place(exp, config)
    images = jax.device_put(build.load_images(config).images, mesh.replicated(exp.mesh))
    step = train.compile_step(config, exp, state, images, indices)
    losses = []
    while len(losses) < 4000 and (len(losses) < 100 or np.mean(losses[-100:]) > 0.018):
        state, metrics = step(state, images, indices)
        losses.append(float(metrics['loss']))
    assert np.mean(losses[:5]) > 0.5
    assert np.mean(losses[-100:]) < 0.02


# The loop.


class Recorder:
    """Stands for the log, the saver and the preview of `train.loop`; records what it is asked for."""

    def __init__(self):
        self.calls = []

    def advance(self):
        self.calls.append('advance')

    def write(self, step, metrics):
        self.calls.append(('write', step, metrics))
        return dict.fromkeys(('loss', 'grad_norm', 'param_norm'), 1.0) | {'skipped_in_a_row': float(metrics)}

    def due(self, step):
        return False

    def newest(self):
        return 'there is no checkpoint yet'

    def finish(self, step, state):
        self.calls.append(('finish', step))

    paused = contextlib.nullcontext


def loop(step_fn, *, stop=lambda: False, **settings):
    """`train.loop` from step 0 on, with batches (0,), (1,), …; returns the last state and the calls."""
    recorder = Recorder()
    settings = dict(num_steps=7, log_every=3, max_bad_steps=10) | settings
    start = experiment_of(Pixels(1)).init(jax.random.key(0))
    seams = dict(log=recorder, saver=recorder, preview=recorder, stop=stop)
    state = train.loop(step_fn, start, ((k,) for k in range(100)), **seams, **settings)
    return state, recorder.calls


def test_the_loop_reads_metrics_every_few_steps_only_and_at_the_end():
    """Each step's metrics are read by the log if at all; the stub's cannot be converted to numbers otherwise."""

    def step_fn(state, batch):
        return at_step(state, state.step + 1), np.int32(batch)

    state, calls = loop(step_fn)
    assert int(state.step) == 7
    assert [call for call in calls if call != 'advance'] == [('write', s, s - 1) for s in (3, 6, 7)] + [('finish', 7)]
    assert calls.count('advance') == 7


def test_the_loop_stops_when_asked_and_saves_the_step():
    answers = iter([False, False, True])

    def step_fn(state, batch):
        return at_step(state, state.step + 1), np.int32(0)

    state, calls = loop(step_fn, stop=lambda: next(answers))
    assert int(state.step) == 2 and calls[-1] == ('finish', 2)


def test_too_many_bad_steps_in_a_row_end_the_loop_where_they_are_read():
    """From step 2 on all are bad; four are too many, and metrics are read at the steps 3, 6, …"""

    def step_fn(state, batch):
        return at_step(state, state.step + 1), np.int32(batch)

    with pytest.raises(RunError, match=r'at step 6: the last 5 steps .*there is no checkpoint yet'):
        loop(step_fn, max_bad_steps=4)


def test_utilisation_and_memory_are_logged_where_the_device_states_them(tmp_path, monkeypatch):
    """Utilisation is a step's operations per second over the peak: here 3 million operations for 16 images."""
    config, exp = tiny(), experiment_of(Affine())
    numbers = dict.fromkeys(('loss', 'grad_norm', 'param_norm', 'learning_rate'), jnp.float32(1))

    def lines(folder, peak):
        monkeypatch.setattr(mesh, 'peak_flops', lambda device: peak)
        with train.Log(str(folder), config, exp, 3e6, 0) as log:
            for step in (2, 4):
                log.advance()
                log.advance()
                log.write(step, numbers)
        return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]

    assert all(not {'utilisation', 'peak_bytes'} & line.keys() for line in lines(tmp_path / 'unknown', None))
    monkeypatch.setattr(memory, 'peak', lambda: 5_000)
    logged = lines(tmp_path / 'known', 2e9)
    assert [(line['step'], line['peak_bytes']) for line in logged] == [(2, 5_000), (4, 5_000)]
    for line in logged:
        assert line['utilisation'] == pytest.approx(line['images_per_second'] / 16 * 3e6 / 2e9)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('seed', -1),
        ('train.batch_size', 0),
        ('train.ema_decay', 1.0),
        ('train.learning_rate', 0.0),
        ('data.source', 'digit'),
        ('data.image_size', 9),
        ('schedule.name', 'linaer'),
        ('schedule.T', 0),
        ('schedule.beta_end', 0.0),
        ('model.kind', 'epsilon'),
        ('model.dtype', 'float23'),
        ('model.groups', 3),
        ('mesh.fsdp', 3),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, key, value):
    """And the workdir is not created for a network that does not exist."""
    with pytest.raises(RunError) as error:
        train.run(tiny({key: value}), str(tmp_path / 'run'))
    assert 'config.' + key.split('.')[0] in str(error.value)
    assert str(value) in str(error.value)
    assert key.startswith(('seed', 'train')) or not (tmp_path / 'run').exists()


def test_a_deterministic_step_is_compiled_with_the_options_of_its_platform(monkeypatch):
    monkeypatch.setattr(train, 'deterministic', lambda platform: {'platform': platform})
    config = quick({'train.deterministic': True})
    exp = build.build(config)
    asked = types.SimpleNamespace(compile=lambda *args, options, **how: options)
    state, images = exp.abstract_state(), jax.ShapeDtypeStruct((4, 8, 8, 1), np.uint8)
    assert train.compile_step(config, dataclasses.replace(exp, implementation=asked), state, images) == {
        'platform': jax.default_backend()
    }


@pytest.mark.slow
def test_the_step_for_gpus_does_the_same_as_the_plain_one(monkeypatch):
    """Three steps from the same weights, with dropout, attention, clipping and accumulation: 1e-6 at each."""
    monkeypatch.setattr(train, 'deterministic', lambda platform: QUICK)
    changes = {
        'train.deterministic': True,
        'model.num_blocks': 1,
        'model.attention_resolutions': (8,),
        'model.dropout': 0.2,
        'train.grad_clip': 1.0,
        'train.learning_rate': 2e-4,
        'train.accumulate': 2,
    }
    found = {}
    for name in ('plain', 'gpu'):
        config = tiny(changes | {'model.implementation': name})
        exp = build.build(config)
        params = jax.tree.map(jnp.asarray, random_params(config, 0))
        state = exp.packed(exp.start(params, jax.tree.map(jnp.copy, params)))
        assert (jax.tree.structure(state.params) == jax.tree.structure(params)) == (name == 'plain')
        batches = train.feed(config, exp, data.load('digits', 'train', image_size=8, channels=1, cache=False), 0)
        first = next(batches)
        step_fn = train.compile_step(config, exp, state, *first)
        found[name] = []
        for _, batch in zip(range(3), itertools.chain([first], batches), strict=False):
            state, metrics = step_fn(state, *batch)
            found[name].append(jax.device_get((exp.unpacked(state), metrics)))
    for plain_step, gpu_step in zip(found['plain'], found['gpu'], strict=True):
        (expected, logged), (state, metrics) = plain_step, gpu_step
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        for key in logged:
            np.testing.assert_allclose(metrics[key], logged[key], rtol=1e-6, err_msg=key)
        for part in ('params', 'ema'):
            one, other = getattr(state, part), getattr(expected, part)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), one, other)
