"""Runs with a learned variance: training by each loss, resuming, samples, likelihoods, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import build, loss, schedule, workdir
from diffusion.modes import export, import_weights, likelihood, sample, sweep, train
from diffusion.networks import IMPLEMENTATIONS, plain
from diffusion.runtime import mesh
from diffusion.util import RunError
from tests.likelihood_oracles import QUICK
from tests.runs import assert_bitwise, checkpoint, make_run, quick, random_params, tiny

LEARNED = {'model.variance': 'learned', 'train.loss': 'vlb_importance'}
KEY = jax.random.key(0)
SAMPLE = {'sample.num_images': 2, 'sample.num_steps': 3, 'sample.batch_size': 2, 'sample.metrics': ()}


def learned(**changes):
    """A config of a network of two layers; in the names of changes, __ stands for the dot."""
    return quick(LEARNED | SAMPLE | {key.replace('__', '.'): value for key, value in changes.items()})


# Training.


class Constant:
    """Returns its parameters for every image: the output, and v."""

    def init(self, key):
        return {'both': jnp.array([0.3, -0.2])}

    def net(self, params, *, dropout_key=None):
        return lambda x_t, t: jnp.broadcast_to(params['both'], (*x_t.shape[:-1], 2))


def squares(schedule, net, x0, t, eps, kind):
    """A loss that compiles quickly: larger at higher levels, and other for each image."""
    return t * jnp.mean((net(x0, t)[..., :1] - eps) ** 2, axis=(1, 2, 3))


def steps(count, accumulate=1):
    """The states after each of `count` steps on 16 images, and the losses."""
    optimizer = optax.GradientTransformation(
        lambda params: params, lambda g, state, params=None: (jax.tree.map(jnp.zeros_like, g), g)
    )
    sch = schedule.linear(4, 0.1, 0.5)
    exp = build.Experiment(sch, Constant(), optimizer, lambda updates: 0.1, mesh.make_mesh(), plain, by_history=True)
    how = dict(exp=exp, seed=0, kind='v', weighting='squares', learned=True, ema_decay=0.9, flip=False)
    step = jax.jit(
        lambda state, images: train.train_step(state, images, None, accumulate=accumulate, **how),
        compiler_options=QUICK,
    )
    states, losses = [exp.init(jax.random.key(0))], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.WEIGHTINGS, 'squares', loss.Weighting(loss.uniform_levels, None, squares, by_history=True))
        for _ in range(count):
            state, metrics = step(states[-1], np.zeros((16, 2, 2, 1), np.uint8))
            states.append(state)
            losses.append(float(metrics['loss']))
    return states, losses


@pytest.fixture(scope='module')
def five_steps():
    return steps(5)


def test_a_step_draws_by_the_history_and_takes_up_its_losses(five_steps):
    """Four of each level in the first steps; from then on, more of the levels whose losses are larger."""
    states, losses = five_steps
    counts = np.array([state.history.counts for state in states])
    np.testing.assert_array_equal(counts[:4], np.arange(4)[:, None] * 4 * np.ones((1, 4)))
    kept = np.asarray(states[3].history.losses)
    assert (kept > 0).all()
    root = np.sqrt((kept**2).mean(axis=1))
    drawn = (counts[4] - 10) % 10 - (counts[3] - 10) % 10
    np.testing.assert_allclose(drawn % 10, 16 * root / root.sum() % 10, atol=1.1)
    assert np.std(drawn) > 0
    first = np.asarray(states[1].history.losses)[:, :4]
    np.testing.assert_allclose(losses[0], first.mean(), rtol=1e-5)  # uniform: the weights are 1


@pytest.mark.slow
def test_parts_of_a_batch_have_the_losses_of_the_whole(five_steps):
    states, losses = steps(5, accumulate=4)
    np.testing.assert_allclose(losses, five_steps[1], rtol=1e-5)
    for ours, whole in zip(states, five_steps[0], strict=True):
        np.testing.assert_array_equal(ours.history.counts, whole.history.counts)
        np.testing.assert_allclose(ours.history.losses, whole.history.losses, rtol=1e-5)


def test_a_bad_step_leaves_the_history_as_it_was(monkeypatch):
    monkeypatch.setattr(Constant, 'init', lambda self, key: {'both': jnp.array([np.nan, 0.0])})
    states, losses = steps(1)
    assert np.isnan(losses[0]) and int(states[1].skipped.total) == 1
    for before, after in zip(states[0].history, states[1].history, strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_history_of_a_packed_state_is_the_same():
    exp = dataclasses.replace(build.build(learned()), implementation=IMPLEMENTATIONS['gpu'])
    abstract = exp.abstract_state()
    state = exp.start(*(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract.params) for _ in range(2)))
    state = dataclasses.replace(state, history=loss.update_history(state.history, jnp.array([1, 2]), jnp.ones(2)))
    packed = exp.packed(state)
    assert jax.tree.structure(packed.params) != jax.tree.structure(state.params)
    back = exp.unpacked(packed)
    for before, between, after in zip(state.history, packed.history, back.history, strict=True):
        np.testing.assert_array_equal(before, between)
        np.testing.assert_array_equal(before, after)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of six steps without a break."""
    path = tmp_path_factory.mktemp('runs') / 'unbroken'
    assert train.run(learned(train__num_steps=6), str(path)) == 0
    return path


def test_a_run_resumes_bit_by_bit_with_its_history(run, tmp_path):
    for num_steps in (4, 6):
        train.run(learned(train__num_steps=num_steps), str(tmp_path))
    arrays = checkpoint(run, 6)
    losses = arrays["history['losses']"]
    assert losses.shape == (4, 10) and (losses != 0).all()
    assert_bitwise(arrays, checkpoint(tmp_path, 6))
    assert arrays["params['conv_out']['kernel']"].shape[-1] == 2  # one channel and its v


def test_a_run_changes_its_loss(run, tmp_path):
    """From the history to none, and to one that begins at this step."""
    by_history, config = build.build(learned()), learned(train__loss='hybrid')
    without = build.build(config)

    def restored(exp, path):
        with workdir.open_checkpoints(config, str(path)) as checkpoints:
            return train.restore(config, exp, str(path), checkpoints)

    state = restored(without, run)
    assert int(state.step) == 6 and state.history is None
    shutil.copytree(run, tmp_path / 'run')
    with workdir.open_checkpoints(config, str(tmp_path / 'run'), writing=True) as checkpoints:
        checkpoints.save(7, workdir.plain(config), **state.trees())
    again = restored(by_history, tmp_path / 'run')
    assert int(again.step) == 7 and again.history.losses.shape == (4, 10) and not np.any(again.history.counts)
    np.testing.assert_array_equal(*(np.asarray(s.params['conv_out']['kernel']) for s in (state, again)))


# Samples and likelihoods.


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A checkpoint of random parameters, whose v is not 0."""
    config = learned()
    params = random_params(config, 0)
    return make_run(tmp_path_factory.mktemp('model'), config, 1, params=params, ema=params)


def test_samples_have_the_learned_variance_where_eta_is_1(model):
    assert sample.run(learned(sample__eta=1.0, sample__variance='auto'), str(model)) == 0
    (folder,) = (model / 'samples').iterdir()
    record = json.loads((folder / 'record.json').read_text())
    assert record['variance'] == 'learned' and '-learned' in folder.name and record['model']['variance'] == 'learned'


@pytest.mark.parametrize(
    ('eta', 'variance', 'chosen'),
    [(1.0, 'auto', 'learned'), (1.0, 'large', 'large'), (0.5, 'auto', 'small'), (0.0, 'small', 'small')],
)
def test_samplers_take_the_half_that_they_need(eta, variance, chosen):
    config = learned(sample__eta=eta, sample__variance=variance)
    exp = build.build(config)
    done, chain = sample.resolve_chain(config.sample, exp)
    assert done['variance'] == chosen
    draw = sample.follow_chain(exp, (8, 8, 1), kind='eps', rule='kernel', **chain)
    params = exp.abstract_state().params
    images = jax.eval_shape(lambda params, keys: draw(keys, exp.network.net(params)), params, jax.random.split(KEY, 2))
    assert images.shape == (2, 8, 8, 1)


def test_a_sweep_has_a_row_of_the_learned_variance():
    config = learned(sweep__etas=(0.0,), sweep__num_steps=(2,))
    assert [cell.row for cell in sweep.all_cells(config)] == ['η = 0', 'σ̂', 'Σ_θ']
    fixed = quick({'sweep.etas': (0.0,), 'sweep.num_steps': (2,)})
    assert [cell.row for cell in sweep.all_cells(fixed)] == ['η = 0', 'σ̂']
    exp = build.build(config)
    for cell in sweep.all_cells(config):
        steps = sweep.make_steps(config, exp, cell)
        assert (steps.widening is not None) == (cell.variance == 'learned')


@pytest.mark.slow
def test_likelihoods_have_the_learned_variance(model, tmp_path):
    how = dict(likelihood__num_images=2, likelihood__quantities=('posterior',), likelihood__batch_size=2)
    assert likelihood.run(learned(**how, likelihood__folder=str(tmp_path)), str(model)) == 0
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / 'ledger.json').read_text())['settings']['variance'] == 'learned'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('variance', 'asked', 'chosen'),
    [
        ('learned', {}, 'learned'),
        ('learned', {'likelihood.eta': 0.5}, 'small'),
        ('learned', {'likelihood.variance': 'large'}, 'large'),
        ('fixed', {}, 'small'),
        ('fixed', {'likelihood.variance': 'large'}, 'large'),
    ],
)
def test_the_variance_of_a_likelihood(variance, asked, chosen):
    config = quick(asked | {'model.variance': variance, 'likelihood.quantities': ('posterior', 'importance')})
    assert likelihood.choose_variance(config) == chosen
    likelihood.check_shapes(config, build.build(config))


# What is refused.


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'train__loss': 'simple'}, ('config.train.loss', "'simple' would not train the learned variance", "'hybrid'")),
        ({'train__loss': 'hybrid', 'model__variance': 'fixed'}, ('config.train.loss', "model.variance='learned'")),
        ({'model__variance': 'none'}, ('config.model.variance', "'none'", 'fixed', 'learned')),
    ],
)
def test_a_loss_must_train_what_the_model_has(changes, words, tmp_path):
    with pytest.raises(RunError) as error:
        train.run(learned(**changes), str(tmp_path))
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('mode', 'changes', 'words'),
    [
        (sample, {'sample__eta': 0.5, 'sample__variance': 'learned'}, ('config.sample', 'eta=0.5', "'small'", 'eta=1')),
        (likelihood, {'likelihood__eta': 0.5, 'likelihood__variance': 'learned'}, ('config.likelihood', 'eta=0.5')),
        (train, {'model__variance': 'fixed', 'train__loss': 'vlb'}, ('model.variance', "'learned' there")),
    ],
)
def test_what_does_not_fit_a_learned_variance_is_refused(mode, changes, words, model):
    with pytest.raises(RunError) as error:
        mode.run(learned(**changes), str(model))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(('mode', 'key'), [(sample, 'sample'), (likelihood, 'likelihood')])
def test_a_model_without_it_is_refused(mode, key, tmp_path):
    config = quick({f'{key}.variance': 'learned', f'{key}.eta': 1.0})
    with pytest.raises(RunError, match=rf"config.{key}: variance is 'learned', but the model has .*'fixed'.*=learned"):
        mode.run(config, str(tmp_path))


def test_a_network_without_the_outputs_is_refused(monkeypatch):
    class Narrow:
        def __init__(self, *, image_channels, rngs):
            raise AssertionError('refused before')

    monkeypatch.setitem(build.NETWORKS, 'narrow', Narrow)
    with pytest.raises(RunError, match=r"config.model: variance is 'learned', but network is 'narrow'.*out_channels"):
        build.build(learned(model__network='narrow'))


def test_a_run_from_before_there_was_a_variance_goes_on(tmp_path):
    config = quick()
    params = random_params(config, 0)
    make_run(tmp_path, config, 1, params=params, ema=params)
    stored = json.loads((tmp_path / 'config.json').read_text())
    del stored['model']['variance']
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    workdir.check_config(config, str(tmp_path))
    with pytest.raises(RunError, match=r"config.model.variance: 'fixed' there, 'learned' asked"):
        workdir.check_config(learned(), str(tmp_path))


@pytest.mark.slow
def test_an_exported_model_is_imported_again(tmp_path):
    """diffusers' DDPMPipeline with 'learned_range'; its DDIMPipeline cannot use it, and the model card says so."""
    config = tiny(LEARNED)
    params = random_params(config, 0)
    run = make_run(tmp_path / 'run', config, 1, params=params, ema=params)
    assert export.run(config, str(run)) == 0
    folder = run / 'export' / 'step1-ema'
    unet, scheduler = (
        json.loads((folder / name).read_text()) for name in ('unet/config.json', 'scheduler/scheduler_config.json')
    )
    assert (unet['in_channels'], unet['out_channels'], scheduler['variance_type']) == (1, 2, 'learned_range')
    card = (folder / 'README.md').read_text()
    assert 'DDIMPipeline.from_pretrained' not in card and 'DDIMPipeline cannot use it' in card
    back = tiny({'interop.source': f'diffusers:{folder}', 'sample.eta': 1.0})
    assert import_weights.run(back, str(tmp_path / 'back')) == 0
    stored = workdir.read_config(str(tmp_path / 'back'))
    assert stored['model']['variance'] == 'learned'
    kernel = checkpoint(tmp_path / 'back', 0)["params['conv_out']['kernel']"]
    np.testing.assert_array_equal(kernel, params['conv_out']['kernel'])
