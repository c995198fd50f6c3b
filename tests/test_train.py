"""Training: one step against arithmetic by hand, and whole runs as processes that are stopped and go on."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from configs import digits
from diffusion import data, experiment, schedule, train
from diffusion.experiment import Experiment, RunError, TrainState
from diffusion.runtime import mesh as meshes
from diffusion.runtime.lock import Lock
from tests.test_main import CONFIG, ROOT, assert_refused, main

TINY = {
    'model.channels': 8,
    'model.groups': 4,
    'model.multipliers': (1,),
    'model.attention_resolutions': (),
    'schedule.T': 4,
    'schedule.beta_start': 0.1,
    'schedule.beta_end': 0.5,
    'train.batch_size': 16,
    'train.num_steps': 4,
    'train.learning_rate': 1e-2,
    'train.warmup_steps': 4,
    'train.ema_decay': 0.9,
    'train.checkpoint_every': 1000,
    'train.log_every': 1,
    'train.sample_every': 0,
}


def tiny(changes=None):
    """The config of a network and a chain so small that compiling them is most of the work."""
    config = digits.get_config()
    config.update_from_flattened_dict(TINY | (changes or {}))
    return config


# One step, with a network that is not one, so that its gradient is known.


class Pixels:
    """Answers its parameters, whatever it is shown. For kind 'x0' the gradient then tells what x_0 was."""

    def __init__(self, *shape):
        self.shape = shape

    def init(self, key):
        return {'answer': jnp.zeros(self.shape)}

    def net(self, params, *, dropout_key=None):
        return lambda x_t, t: jnp.broadcast_to(params['answer'], x_t.shape)


class Affine:
    """scale·x_t + shift, with random numbers of its own as a dropout has them."""

    def init(self, key):
        return {'shift': 0.3 * jax.random.normal(key, (8, 8, 1)), 'scale': jnp.float32(-0.5)}

    def net(self, params, *, dropout_key=None):
        assert dropout_key is not None  # while training, dropout is on
        return lambda x_t, t: params['scale'] * x_t + params['shift'] + 0.1 * jax.random.normal(dropout_key, x_t.shape)


def tell_gradient():
    """An optimizer that changes nothing, and whose state is the gradient it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


SCHEDULE = schedule.linear(4, 0.1, 0.5)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)


def experiment_of(network, optimizer=None, learning_rate=lambda step: 0.1):
    return Experiment(SCHEDULE, network, optimizer or tell_gradient(), learning_rate, meshes.make_mesh())


def stepper(exp, *, seed=0, kind='eps', ema_decay=0.9, flip=False):
    """(state, images, indices) → (state, metrics), compiled; nothing is donated."""
    how = dict(exp=exp, seed=seed, kind=kind, weighting='simple', ema_decay=ema_decay, flip=flip)
    return jax.jit(functools.partial(train.train_step, **how))


@functools.cache
def gradient_stepper(seed):
    return stepper(experiment_of(Affine()), seed=seed)


def indices_of(step, batch_size=16):
    return np.random.default_rng(step).integers(0, len(IMAGES), batch_size, dtype=np.int32)


def host(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def run_by_hand(*, grad_clip, warmup_steps, learning_rate=1e-2):
    """Eight steps of train_step, and beside each the Adam of Kingma & Ba 2014, Algorithm 1, in float64.

    Each gradient is asked of the same train_step, with an optimizer that tells it. Returns (parameters by
    train_step, by hand) after each step, and the metrics with the gradients.
    """
    config = tiny(
        {'train.grad_clip': grad_clip, 'train.learning_rate': learning_rate, 'train.warmup_steps': warmup_steps}
    ).train
    optimizer, rate = experiment.make_optimizer(config)
    exp = experiment_of(Affine(), optimizer, rate)
    step_fn, gradient_fn = stepper(exp), gradient_stepper(0)
    state = exp.init(jax.random.key(1))
    by_hand = host(state.params)
    m = v = jax.tree.map(np.zeros_like, by_hand)
    both, metrics = [], []
    for k in range(8):
        indices = indices_of(k)
        told, _ = gradient_fn(TrainState(state.step, state.params, state.ema, state.params), IMAGES, indices)
        gradient = host(told.opt_state)
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        factor = min(1, grad_clip / norm) if grad_clip else 1
        seen = jax.tree.map(lambda g, factor=factor: g * factor, gradient)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, seen)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, seen)
        lr = learning_rate * min(1, (k + 1) / warmup_steps) if warmup_steps else learning_rate
        by_hand = jax.tree.map(
            lambda p, m, v, k=k, lr=lr: (
                p - lr * m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
            ),
            by_hand,
            m,
            v,
        )
        state, seen = step_fn(state, IMAGES, indices)
        both.append((host(state.params), by_hand))
        metrics.append(host(seen) | {'norm': norm, 'lr': lr})
    return both, metrics


@pytest.mark.parametrize(('grad_clip', 'warmup_steps'), [(0.1, 4), (0.0, 0)], ids=['clip and warm-up', 'neither'])
def test_a_step_is_adam_behind_a_clip(grad_clip, warmup_steps):
    """Adam forgets the scale of gradients but not that of each beside the others: 0.1 clips all of them."""
    both, metrics = run_by_hand(grad_clip=grad_clip, warmup_steps=warmup_steps)
    norms = [m['norm'] for m in metrics]
    assert min(norms) > 0.1 and max(norms) > 1.2 * min(norms)  # or the clip would not show
    for ours, by_hand in both:
        for name in ours:
            np.testing.assert_allclose(ours[name], by_hand[name], rtol=0, atol=2e-6)
    np.testing.assert_allclose([m['grad_norm'] for m in metrics], norms, rtol=1e-5)  # logged as before the clip
    np.testing.assert_allclose([m['learning_rate'] for m in metrics], [m['lr'] for m in metrics], rtol=1e-6)


def test_the_learning_rate_is_that_of_the_step_though_steps_were_skipped():
    """Adam's first update is the sign of the gradient, whatever came before: 0.01·4/8 in the fourth step."""
    config = tiny({'train.learning_rate': 1e-2, 'train.warmup_steps': 8, 'train.grad_clip': 0.0}).train
    exp = experiment_of(Affine(), *experiment.make_optimizer(config))
    start = exp.init(jax.random.key(1))
    state, metrics = stepper(exp)(
        TrainState(jnp.int32(3), start.params, start.ema, start.opt_state), IMAGES, indices_of(0)
    )
    moved = np.abs(host(state.params)['scale'] - host(start.params)['scale'])
    assert float(metrics['learning_rate']) == pytest.approx(0.005)
    assert moved == pytest.approx(0.005, rel=1e-4)


def test_the_average_follows_the_new_parameters():
    """ē ← d·ē + (1−d)·θ with d = min(decay, (1+t)/(10+t)), θ the parameters that step t gives (FIELD.md 2.13)."""
    exp = experiment_of(Affine(), optax.sgd(1.0))
    step_fn = stepper(exp, ema_decay=0.5)
    state = exp.init(jax.random.key(1))
    average = host(state.ema)
    assert all((average[name] == host(state.params)[name]).all() for name in average)
    for t in range(16):  # from t = 8 on the decay is 0.5
        state, _ = step_fn(state, IMAGES, indices_of(t))
        decay = min(0.5, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, host(state.params))
        for name in average:
            np.testing.assert_allclose(host(state.ema)[name], average[name], rtol=0, atol=2e-6)
    assert max(np.abs(average[name] - host(state.params)[name]).max() for name in average) > 1e-2


def test_without_decay_the_average_is_the_parameters():
    exp = experiment_of(Affine(), optax.sgd(1.0))
    state, _ = stepper(exp, ema_decay=0.0)(exp.init(jax.random.key(1)), IMAGES, indices_of(0))
    assert all((state.ema[name] == state.params[name]).all() for name in state.params)


def clean_images(*, flip, seed=0, step=0, indices):
    """The x_0 that a step trains on: the mean-squared error's gradient at the answer 0 is −2·x_0/size."""
    exp = experiment_of(Pixels(len(indices), 8, 8, 1))
    start = exp.init(jax.random.key(0))
    state = TrainState(jnp.int32(step), start.params, start.ema, start.opt_state)
    state, _ = stepper(exp, kind='x0', flip=flip, seed=seed)(state, IMAGES, indices)
    gradient = np.asarray(state.opt_state['answer'])
    return gradient * (-gradient.size / 2)


def test_flips_mirror_about_half_of_the_images_and_leave_the_rest():
    indices = indices_of(0, 400)
    expected = data.to_float(IMAGES[indices])
    np.testing.assert_allclose(clean_images(flip=False, indices=indices), expected, atol=1e-5)
    mirrored = []
    for step in (0, 1):
        x0 = clean_images(flip=True, step=step, indices=indices)
        is_as_it_was = np.abs(x0 - expected).max((1, 2, 3)) < 1e-5
        is_mirrored = np.abs(x0 - expected[:, :, ::-1]).max((1, 2, 3)) < 1e-5
        assert (is_as_it_was ^ is_mirrored).all()
        assert abs(is_mirrored.sum() - 200) < 5 * 10  # five standard deviations
        mirrored.append(is_mirrored)
    assert 0.3 < np.mean(mirrored[0] == mirrored[1]) < 0.7


def test_a_step_draws_from_seed_and_step_alone():
    exp = experiment_of(Affine())
    start = exp.init(jax.random.key(1))
    losses = []
    for seed in (0, 1):
        for step in (0, 1, 2, 0):
            state = TrainState(jnp.int32(step), start.params, start.ema, start.opt_state)
            losses.append(float(gradient_stepper(seed)(state, IMAGES, indices_of(0))[1]['loss']))
    assert losses[3] == losses[0] and losses[7] == losses[4]
    assert len(set(losses)) == 6


def test_no_key_of_a_step_serves_twice():
    """Flips, levels, noise and dropout are drawn apart."""
    exp = experiment_of(Affine())
    state = exp.init(jax.random.key(1))
    with jax.debug_key_reuse(True):
        stepper(exp, flip=True)(state, IMAGES, indices_of(0))


def test_the_state_holds_no_randomness():
    """Keys follow from (seed, step); with dropout, too."""
    exp = experiment.build(tiny({'model.dropout': 0.5}))
    state = exp.abstract_state()
    assert sorted(vars(state)) == ['ema', 'opt_state', 'params', 'step']
    for leaf in jax.tree.leaves((state.params, state.ema)):
        assert leaf.dtype == jnp.float32
    for leaf in jax.tree.leaves((state.step, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    optimizer_leaves = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert all(leaf.shape == () for leaf in optimizer_leaves)  # counters of steps


def place(exp, config):
    """What `train.compile_step` takes, on the devices as `train.run` puts it."""
    abstract = exp.abstract_state()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return (
        jax.jit(exp.init, out_shardings=shardings)(jax.random.key(0)),
        jax.device_put(IMAGES, meshes.replicated(exp.mesh)),
        jax.device_put(np.arange(config.train.batch_size, dtype=np.int32), meshes.split_batch(exp.mesh)),
    )


def test_the_old_state_is_given_to_the_new_one():
    config = tiny()
    exp = experiment_of(Affine(), optax.adam(1.0))
    old, images, indices = place(exp, config)
    new, _ = train.compile_step(config, exp, old, images, indices)(old, images, indices)
    assert int(new.step) == 1
    for leaf in jax.tree.leaves((old.params, old.ema, old.opt_state)):
        assert leaf.is_deleted()
    assert not images.is_deleted()


def test_one_batch_can_be_learned():
    """By the U-Net and the loss of training, with new levels and new noise at each step: not one draw is learned by
    heart. x_0 is one of four images, so that ε can be known from x_t."""
    config = tiny({'model.channels': 16, 'train.batch_size': 4, 'train.warmup_steps': 10, 'train.ema_decay': 0.98})
    exp = experiment.build(config)
    state, _, indices = place(exp, config)
    images = jax.device_put(experiment.load_images(config).images, meshes.replicated(exp.mesh))
    step = train.compile_step(config, exp, state, images, indices)
    losses = []
    while len(losses) < 4000 and (len(losses) < 100 or np.mean(losses[-100:]) > 0.018):
        state, metrics = step(state, images, indices)
        losses.append(float(metrics['loss']))
    assert np.mean(losses[:5]) > 0.5
    assert np.mean(losses[-100:]) < 0.02


def log_of_four_steps(workdir, flops):
    """What `train.Loop` logs of steps that are said to have so many operations, and have none."""
    config, exp = tiny(), experiment_of(Affine())
    images = experiment.load_images(config)
    numbers = dict.fromkeys(('loss', 'grad_norm', 'param_norm', 'learning_rate'), jnp.float32(1))

    def step(state, *batch):
        return TrainState(state.step + 1, state.params, state.ema, state.opt_state), numbers

    with (
        experiment.hold(str(workdir)) as held,
        experiment.open_checkpoints(config, str(workdir), writing=True) as checkpoints,
    ):
        loop = train.Loop(config, str(workdir), exp, images, checkpoints, held, None, flops)
        assert loop.run(step, exp.init(jax.random.key(0)), iter([(IMAGES, None)] * 4)) == 4
    return [json.loads(line) for line in (workdir / 'logs' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def test_how_much_a_device_is_used_is_logged_where_its_peak_is_known(tmp_path, monkeypatch):
    """Its operations a second, of those that it could do: a step has 3 million, and 16 images."""
    for name, peak, flops in [('unknown', None, 3e6), ('uncounted', 2e9, float('nan'))]:
        monkeypatch.setattr(meshes, 'peak_flops', lambda device, peak=peak: peak)
        assert all('utilisation' not in line for line in log_of_four_steps(tmp_path / name, flops))
    lines = log_of_four_steps(tmp_path / 'known', 3e6)
    assert len(lines) == 4
    for line in lines:
        assert line['utilisation'] == pytest.approx(line['images_per_second'] / 16 * 3e6 / 2e9)


# Whole runs. Those that need not compile for themselves share what others compiled.


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """Changes of a config by which processes share compiled programs."""
    return {'compile_cache': tmp_path_factory.mktemp('compiled')}


def flags(workdir, **changes):
    """The command line of a tiny run; changes are written with __ for the dot."""
    settings = TINY | {key.replace('__', '.'): value for key, value in changes.items()}
    return [CONFIG, f'--workdir={workdir}', *(f'--config.{key}={value}' for key, value in settings.items())]


def saved(workdir):
    """The steps of the checkpoints that are whole."""
    return sorted(int(folder.name) for folder in (workdir / 'checkpoints').iterdir() if folder.name.isdigit())


def checkpoint(workdir, step):
    """{part and path of an array: the array}, by Orbax alone."""
    arrays = {}
    for part in ('params', 'ema', 'opt_state'):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(workdir / 'checkpoints' / str(step) / part)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[part + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_bitwise(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or one[name].shape != other[name].shape] == []
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def metrics(workdir, last=None):
    """(step, loss, grad_norm, learning_rate) of each line of metrics.jsonl, but for one that is being written."""
    text = (workdir / 'logs' / 'metrics.jsonl').read_text(encoding='utf-8')
    logged = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]
    assert all(line['images_per_second'] > 0 for line in logged)
    names = ('step', 'loss', 'grad_norm', 'learning_rate')
    return [tuple(line[name] for name in names) for line in logged][:last]


LONG = 16  # steps of the run that is interrupted


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, shared):
    """A run without a break, saved at steps 4, 8, …, LONG."""
    workdir = tmp_path_factory.mktemp('unbroken')
    changes = dict(train__num_steps=LONG, train__checkpoint_every=4, train__keep_checkpoints=LONG)
    done = main(*flags(workdir, **changes, **shared))
    assert done.returncode == 0, done.stderr
    assert saved(workdir) == list(range(4, LONG + 1, 4))
    assert str(workdir / 'checkpoints') in done.stdout
    return workdir


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory, shared):
    """The same run, ended after two steps."""
    workdir = tmp_path_factory.mktemp('two')
    done = main(*flags(workdir, train__num_steps=2, **shared))
    assert done.returncode == 0, done.stderr
    assert saved(workdir) == [2]
    return workdir


def test_the_logs_tell_of_each_step(unbroken):
    rows = metrics(unbroken)
    assert [step for step, *_ in rows] == list(range(1, LONG + 1))
    np.testing.assert_allclose([rate for *_, rate in rows][:6], [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-6)
    losses = [loss for _, loss, *_ in rows]
    assert losses[0] == pytest.approx(1, abs=0.2)  # the last convolution starts at zero, and E ε² = 1
    assert np.mean(losses[-8:]) < 0.9 * losses[0]
    assert len(set(losses)) == LONG
    assert json.loads((unbroken / 'config.json').read_text())['model']['channels'] == 8


def test_two_steps_and_two_more_are_four(unbroken, two_steps, tmp_path):
    """In a new process, that compiles for itself and draws a sample on the way: bit by bit the same."""
    workdir = tmp_path / 'run'
    shutil.copytree(two_steps, workdir)
    done = main(*flags(workdir, train__num_steps=4, train__sample_every=4))
    assert done.returncode == 0, done.stderr
    assert 'step 2 of 4' in done.stdout
    assert saved(workdir) == [2, 4]
    assert_bitwise(checkpoint(workdir, 4), checkpoint(unbroken, 4))
    assert metrics(workdir) == metrics(unbroken, last=4)
    (path,) = (workdir / 'samples' / 'progress').iterdir()
    with Image.open(path) as picture:
        assert np.ptp(np.asarray(picture)) > 100


def test_what_was_trained_can_be_sampled(unbroken):
    done = main(*flags(unbroken, sample__num_images=3, sample__num_steps=4), '--mode=sample')
    assert done.returncode == 0, done.stderr
    assert f'3 images from step {LONG}, ema weights' in done.stdout
    written = [line for line in done.stdout.splitlines() if line.startswith(str(unbroken / 'samples'))]
    assert [path.rpartition('/')[2] for path in written] == ['grid.png', 'samples.npz', 'record.json']
    with np.load(written[1]) as arrays:
        assert arrays['arr_0'].shape == (3, 8, 8, 1)
    with open(written[2], encoding='utf-8') as file:
        record = json.load(file)
    assert record['checkpoint_step'] == LONG
    assert f'{record["quality"]["value"]:.4f}' in done.stdout and record['quality']['metric'] in done.stdout
    if jax.default_backend() == 'cpu':
        assert record['device'] == f'{min(len(os.sched_getaffinity(0)), 3)} × cpu'  # one for each image at most


def test_the_same_command_again_says_that_it_is_complete(two_steps, capsys):
    def files():
        folders = two_steps / 'checkpoints', two_steps / 'logs'
        return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob('*')}

    before = files()
    assert train.run(tiny({'train.num_steps': 2}), str(two_steps)) == 0
    printed = capsys.readouterr().out
    assert 'complete' in printed and '2 steps' in printed and str(two_steps / 'checkpoints') in printed
    assert files() == before


@pytest.mark.parametrize(
    'key', ['model.channels', 'model.kind', 'schedule.T', 'schedule.name', 'data.flip', 'model.dropout']
)
def test_another_network_or_schedule_is_refused(two_steps, key):
    value = {
        'model.channels': 16,
        'model.kind': 'v',
        'schedule.T': 5,
        'schedule.name': 'cosine',
        'data.flip': True,
        'model.dropout': 0.1,
    }[key]
    before = (two_steps / 'config.json').read_bytes()
    with pytest.raises(RunError) as error:
        train.run(tiny({key: value, 'train.num_steps': 4}), str(two_steps))
    assert f'config.{key}: ' in str(error.value) and f'{value!r} asked' in str(error.value)
    assert str(error.value).count('config.') == 1  # the others are the same
    assert (two_steps / 'config.json').read_bytes() == before and saved(two_steps) == [2]


def test_a_place_that_takes_no_checkpoints_is_refused_before_the_first_step(tmp_path):
    (tmp_path / 'checkpoints').write_text('not a folder')
    with pytest.raises(RunError, match=r'/checkpoints cannot be written to .*--workdir'):
        train.run(tiny(), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} <= {'checkpoints', '.lock'}


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(two_steps, tmp_path):
    """Steps 3 to 6 have finite losses and gradients, but their updates are absurd: nothing of them is kept."""
    workdir = tmp_path / 'run'
    shutil.copytree(two_steps, workdir)
    changes = dict(train__num_steps=100, train__learning_rate=1e30, train__warmup_steps=0, train__checkpoint_every=1)
    done = main(*flags(workdir, train__max_bad_steps=4, **changes))
    assert_refused(done, 'param_norm inf at step 6', 'last of 4 in a row', 'the checkpoint of step 5 is good')
    assert done.returncode == 1
    kept, before = checkpoint(workdir, 5), checkpoint(two_steps, 2)
    assert_bitwise(kept, before)
    assert all(np.isfinite(array).all() for array in kept.values())
    lines = [json.loads(line) for line in (workdir / 'logs' / 'metrics.jsonl').read_text().splitlines()]
    assert [(line['step'], line['skipped']) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]
    assert lines[-1]['param_norm'] is None and lines[-1]['loss'] > 0


def test_a_bad_step_among_good_ones_is_left_out():
    """Of two steps the second sees NaN: parameters, average and optimizer are those of one step."""
    exp = experiment_of(Pixels(8, 8, 1), optax.adam(1.0))
    step = stepper(exp, kind='x0')
    good, bad = IMAGES.astype(np.float32), np.full(IMAGES.shape, np.nan, np.float32)
    indices = jnp.arange(4)
    state = exp.init(jax.random.key(0))
    once, _ = step(state, good, indices)
    poisoned, metrics = step(once, bad, indices)
    assert not np.isfinite(float(metrics['loss'])) and int(poisoned.step) == 2
    for name in ('params', 'ema', 'opt_state'):
        for kept, before in zip(*(jax.tree.leaves(getattr(s, name)) for s in (poisoned, once)), strict=True):
            np.testing.assert_array_equal(kept, before)


@contextlib.contextmanager
def started(command):
    """A run as a process, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, 'main.py', *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def await_step(workdir, step, process):
    """Until that step is logged."""
    log, deadline = workdir / 'logs' / 'metrics.jsonl', time.monotonic() + 300
    while process.poll() is None and not (log.exists() and metrics(workdir) and metrics(workdir)[-1][0] >= step):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(unbroken, tmp_path, shared):
    """A grid of samples at each step makes it slow enough for a signal to arrive."""
    workdir = tmp_path / 'run'
    command = flags(workdir, train__num_steps=LONG, train__sample_every=1, **shared)
    with started(command) as process:
        await_step(workdir, 1, process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert 'Traceback' not in errors
    (step,) = saved(workdir)  # nothing but the signal saved it
    assert 1 <= step < LONG
    assert f'SIGINT: stopped after step {step}, which is saved' in output
    assert metrics(workdir) == metrics(unbroken, last=step)

    again = main(*command)
    assert again.returncode == 0, again.stderr
    assert f'step {step} of {LONG}' in again.stdout
    assert_bitwise(checkpoint(workdir, LONG), checkpoint(unbroken, LONG))
    assert metrics(workdir) == metrics(unbroken)


def test_a_workdir_that_is_moved_under_the_run_is_made_anew(unbroken, tmp_path, shared):
    workdir, moved = tmp_path / 'run', tmp_path / 'moved'
    with started(flags(workdir, train__num_steps=10**5, train__checkpoint_every=4, **shared)) as process:
        await_step(workdir, 5, process)
        workdir.rename(moved)
        await_step(workdir, 10, process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert f'{workdir} was removed or moved under the run' in errors and 'Traceback' not in errors
    assert metrics(moved) == metrics(unbroken, last=len(metrics(moved)))
    step = saved(workdir)[-1]
    assert f'stopped after step {step}, which is saved' in output
    again = main(*flags(workdir, train__num_steps=step + 2, **shared))
    assert again.returncode == 0 and f'step {step} of {step + 2}' in again.stdout, again.stderr
    assert len(saved(workdir)) == len(list((workdir / 'checkpoints').iterdir()))  # nothing is left half done


def test_a_workdir_that_another_run_has_taken_is_left_to_it(tmp_path, shared):
    workdir = tmp_path / 'run'
    with started(flags(workdir, train__num_steps=10**5, **shared)) as process:
        await_step(workdir, 1, process)
        workdir.rename(tmp_path / 'moved')
        with Lock(str(workdir)):
            _, errors = process.communicate(timeout=120)
    assert_refused(subprocess.CompletedProcess([], process.returncode, '', errors), str(workdir), f'{os.getpid()}')
    assert [path.name for path in workdir.iterdir()] == ['.lock']


def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(unbroken, tmp_path, shared):
    """A file lies where the folder of checkpoints would be; then it is gone."""
    workdir = tmp_path / 'run'
    with started(flags(workdir, train__num_steps=10**5, train__checkpoint_every=4, **shared)) as process:
        await_step(workdir, 1, process)
        in_the_way = workdir / 'checkpoints'
        in_the_way.rename(tmp_path / 'before')
        in_the_way.write_text('not a folder')
        step = metrics(workdir)[-1][0]
        await_step(workdir, step + 20, process)
        in_the_way.unlink()
        await_step(workdir, metrics(workdir)[-1][0] + 20, process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert 'could not be saved' in errors and 'trying again' in errors and 'Traceback' not in errors
    steps = saved(workdir)
    assert f'stopped after step {steps[-1]}, which is saved' in output
    assert metrics(workdir, last=LONG) == metrics(unbroken)


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
    """And a folder is not taken by a network that cannot be."""
    with pytest.raises(RunError) as error:
        train.run(tiny({key: value}), str(tmp_path / 'run'))
    assert 'config.' + key.split('.')[0] in str(error.value)
    assert str(value) in str(error.value)
    assert key.startswith(('seed', 'train')) or not (tmp_path / 'run').exists()
