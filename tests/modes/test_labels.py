"""Conditional models from the classes of a source to samples and likelihoods, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from diffusion import build, data, schedule, workdir
from diffusion.configs import cifar10_conditional, digits_conditional
from diffusion.data import cache, images, sources
from diffusion.metrics import frechet
from diffusion.modes import export, likelihood, plan, sample, sweep, train
from diffusion.networks import IMPLEMENTATIONS, NETWORKS, plain
from diffusion.runtime import mesh
from diffusion.util import RunError
from tests.galleries import encoded, fill, noise
from tests.runs import assert_bitwise, checkpoint, make_run, quick, random_params, tiny

LABELLED = {'data.labels': True, 'train.label_dropout': 0.5}
SAMPLE = {'sample.num_images': 7, 'sample.num_steps': 3, 'sample.batch_size': 4, 'sample.eta': 0.0}


def conditional(**changes):
    """A config of a conditional network of two layers; in the names of changes, __ stands for the dot."""
    changes = {key.replace('__', '.'): value for key, value in changes.items()}
    return quick(LABELLED | {'model.num_classes': 10} | SAMPLE | changes)


# Training.


class ByClass:
    """Returns the parameter of the image's class: at 0, the gradient counts the images of each class."""

    def init(self, key):
        return {'answer': jnp.zeros(11)}

    def net(self, params, labels, *, dropout_key=None):
        return lambda x_t, t: jnp.broadcast_to(params['answer'][labels][:, None, None, None], x_t.shape)


def counts(labels, *, indices=None, step=0, seed=0, label_dropout=0.0, accumulate=1):
    """How many images of each class a step trains on; the last count is of no class. All images are white."""
    keep_gradient = optax.GradientTransformation(
        lambda params: params, lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient)
    )
    linear = schedule.linear(4, 0.1, 0.5)
    exp = build.Experiment(linear, ByClass(), keep_gradient, lambda updates: 0.1, mesh.make_mesh(), plain)
    state = dataclasses.replace(exp.init(jax.random.key(0)), step=jnp.int32(step))
    white = np.full((len(labels), 2, 2, 1), 255, np.uint8)
    how = dict(exp=exp, kind='x0', weighting='simple', ema_decay=0.9, flip=False, seed=seed)
    state, _ = train.train_step(
        state, white, indices, jnp.asarray(labels), label_dropout=label_dropout, accumulate=accumulate, **how
    )
    size = len(labels) if indices is None else len(indices)
    return np.asarray(state.opt_state['answer']) * (-size / 2)


def test_a_step_trains_each_image_with_its_own_label():
    labels = np.random.default_rng(0).integers(0, 10, 40, dtype=np.int32)
    np.testing.assert_allclose(counts(labels), np.bincount(labels, minlength=11), atol=1e-4)
    indices = jnp.array([3, 3, 7, 20])
    expected = np.bincount(labels[[3, 3, 7, 20]], minlength=11)
    np.testing.assert_allclose(counts(labels, indices=indices), expected, atol=1e-4)
    np.testing.assert_allclose(counts(labels, accumulate=4), counts(labels), atol=1e-4)


def test_labels_are_dropped_with_their_probability_and_anew_in_each_step():
    labels = np.resize(np.arange(10, dtype=np.int32), 4000)
    found = {key: counts(labels, label_dropout=0.3, **dict(key)) for key in [(), (('step', 1),), (('seed', 1),)]}
    for dropped in found.values():
        assert abs(dropped[10] - 1200) < 5 * np.sqrt(4000 * 0.21)
        assert np.abs(dropped[:10] - 280).max() < 5 * np.sqrt(400 * 0.21) and dropped.sum() == pytest.approx(4000)
    assert len({tuple(dropped) for dropped in found.values()}) == 3
    np.testing.assert_allclose(counts(labels, label_dropout=0.3, accumulate=2), found[()], atol=1e-2)


@pytest.mark.parametrize('placement', ['device', 'host'])
def test_the_labels_of_a_batch_are_those_of_its_images(placement):
    config = conditional(data__placement=placement, train__num_steps=8)
    loaded = build.load_images(config, labelled=True)
    digits = sources.open_source('digits', 'train')
    order = data.Order(len(loaded), 16, config.seed)
    given = list(train.feed(config, build.build(config), loaded, 3))
    assert len(given) == 5
    for k, (batch, indices, labels) in enumerate(given, 3):
        shown, named = (np.asarray(array if indices is None else array[indices]) for array in (batch, labels))
        np.testing.assert_array_equal(named, [digits.label(i) for i in order[k]])
        np.testing.assert_array_equal(shown, loaded[order[k]])
        assert isinstance(labels, jax.Array) and (placement == 'device') == (len(labels) == len(loaded))


@pytest.fixture(scope='module')
def run_of_digits(tmp_path_factory):
    """A run of four steps, the last two after a resume."""
    path = tmp_path_factory.mktemp('digits')
    for num_steps in (2, 4):
        config = quick(LABELLED | SAMPLE | {'train.num_steps': num_steps})
        assert train.run(config, str(path)) == 0
    return path


def test_a_run_takes_the_number_of_classes_from_the_source_and_records_the_labels(run_of_digits, tmp_path):
    stored = workdir.read_config(str(run_of_digits))
    assert stored['model']['num_classes'] == 10 and stored['images']['classes'] == [str(i) for i in range(10)]
    assert len(stored['images']['labels_sha256']) == 64
    arrays = checkpoint(run_of_digits, 4)
    assert arrays["params['label']['embedding']"].shape == (11, 8)
    unbroken = tmp_path / 'unbroken'
    train.run(quick(LABELLED | {'train.num_steps': 4}), str(unbroken))
    assert_bitwise(checkpoint(unbroken, 4), arrays)


@pytest.mark.slow
def test_images_in_other_classes_are_other_images(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    png = [encoded(image) for image in noise(20, 8, 8, 1)]
    before = fill(tmp_path / 'one', {f'{"ab"[i // 10]}/{i:02d}.png': png[i] for i in range(20)})
    after = fill(tmp_path / 'two', {f'{"ab"[i // 9 > 0]}/{i:02d}.png': png[i] for i in range(20)})
    changes = LABELLED | {'train.num_steps': 1}
    train.run(quick(changes | {'data.source': f'folder:{before}'}), str(tmp_path / 'run'))
    with pytest.raises(RunError, match='the same images, but in other classes'):
        train.run(quick(changes | {'data.source': f'folder:{after}'}), str(tmp_path / 'run'))


def test_a_picture_that_cannot_be_read_any_more_is_replaced_by_one_of_its_class(monkeypatch):
    pictures = sources.open_source('digits', 'train')
    labels = np.array([pictures.label(i) for i in range(30)], np.int32)
    lost = {4, 5}

    def read(i):
        if i in lost:
            raise ValueError('is gone')
        return pictures.read(i)

    undecoded = images.Undecoded(
        dataclasses.replace(pictures, read=read), cache.Preprocessing('', 8, 1), np.arange(30), labels
    )
    for i in lost:
        (found,) = (j for j in range(30) if j != i and (undecoded[j] == undecoded[i]).all())
        assert labels[found] == labels[i]


def test_pictures_of_the_class_are_tried_in_turn_until_there_were_enough():
    asked = []

    def read(i):
        asked.append(i)
        raise ValueError('is gone')

    pictures = dataclasses.replace(sources.open_source('digits', 'train'), read=read)
    labels = np.array([0, 1, 0, 1, 0], np.int32)
    undecoded = images.Undecoded(pictures, cache.Preprocessing('', 8, 1), np.arange(5), labels)
    with pytest.raises(ValueError, match='19 pictures before it failed as well'):
        _ = undecoded[2]
    assert asked == np.resize([2, 4, 0], 20).tolist()


# Networks.


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name == 'cpu' else pytest.mark.slow) for name in IMPLEMENTATIONS]
)
def test_an_unconditional_network_is_the_conditional_one_without_its_labels(name):
    """It has the same initial parameters, and a row of zeros makes the conditional one compute the same."""
    networks = NETWORKS | IMPLEMENTATIONS[name].NETWORKS
    plain_network = build.make_network(tiny(), networks)
    network = build.make_network(tiny({'data.labels': True, 'model.num_classes': 10}), networks)
    params, of_classes = plain_network.init(jax.random.key(0)), network.init(jax.random.key(0))
    assert 'label' not in params
    assert of_classes['label']['kernel'].shape == (11, 32)
    rest = {key: value for key, value in of_classes.items() if key != 'label'}
    assert_bitwise(
        *({str(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(t)} for t in (rest, params))
    )

    random = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), rest)
    x, t = jnp.float32(np.random.default_rng(0).normal(size=(3, 8, 8, 1))), jnp.array([1, 2, 4])
    kernel = jnp.zeros((11, 32)).at[2].set(0.5).at[10].set(jnp.linspace(-1, 1, 32))
    labels = jnp.array([2, -1, 5])

    @jax.jit
    def outputs(params):
        conditional = params | {'label': {'kernel': kernel}}
        nets = plain_network.net(params), network.net(conditional, labels), network.net(conditional)
        return [net(x, t) for net in nets]

    without, mixed, no_class = outputs(random)
    np.testing.assert_allclose(mixed[2], without[2], atol=1e-4)  # its row is 0
    np.testing.assert_allclose(mixed[1], no_class[1], atol=1e-4)  # −1 is the last row
    assert np.abs(mixed[:2] - without[:2]).max((1, 2, 3)).min() > 1e-2


# Samples.


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run whose network is random."""
    config = conditional()
    params = random_params(config, 1)
    return make_run(tmp_path_factory.mktemp('run'), config, 12, params=params, ema=random_params(config, 2))


def draw(path, config):
    """Images, labels, grid and record of --mode=sample, whose folder is then moved away."""
    assert sample.run(config, str(path)) == 0
    (folder,) = (written for written in (path / 'samples').iterdir() if written.name != 'progress')
    folder = folder.rename(path / f'{len(list(path.iterdir()))}-{folder.name}')
    with np.load(folder / 'samples.npz') as arrays, Image.open(folder / 'grid.png') as grid:
        labels = arrays['arr_1'] if 'arr_1' in arrays.files else None
        return arrays['arr_0'], labels, np.asarray(grid), json.loads((folder / 'record.json').read_text()), folder


@pytest.mark.slow
def test_images_are_of_all_classes_in_turn_in_a_row_each(trained):
    many, labels, grid, _, _ = draw(trained, conditional(sample__num_images=20))
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    tiles = grid[4:, 4:].reshape(10, 52, 2, 52).swapaxes(1, 2)[:, :, :48:6, :48:6]
    np.testing.assert_array_equal(tiles, many.reshape(2, 10, 8, 8).swapaxes(0, 1))
    few, _, _, _, _ = draw(trained, conditional(sample__num_images=3))
    np.testing.assert_array_equal(few, many[:3])  # an image depends on its number alone
    chosen, labels, _, record, _ = draw(trained, conditional(sample__labels='[0, 3, 7]'))
    np.testing.assert_array_equal(labels, [0, 3, 7, 0, 3, 7, 0])
    np.testing.assert_array_equal(chosen[0], many[0])
    assert record['labels'] == '[0, 3, 7]' and (chosen[1:] != many[1:7]).any((1, 2, 3)).all()
    nothing, labels, _, _, _ = draw(trained, conditional(sample__labels='none'))
    assert (labels == -1).all() and (nothing != many[:7]).any((1, 2, 3)).all()


def test_samples_are_measured_by_class(trained):
    changes = {'sample__num_images': 200, 'sample__labels': '3,7,3', 'sample__batch_size': 200}
    images, labels, _, record, _ = draw(trained, conditional(sample__metrics=('FD-pixels',), **changes))
    real = build.load_images(conditional(), labelled=True)
    whole, *of_classes = record['metrics']
    assert whole['n'] == 200 and [(entry['label'], entry['n']) for entry in of_classes] == [(3, 133), (7, 67)]
    for entry in of_classes:
        mine = images[labels == entry['label']], real[:][real.labels == entry['label']]
        moments = (frechet.moments([part / 127.5 - 1]) for part in mine)
        assert entry['value'] == pytest.approx(frechet.distance(*moments), rel=1e-4)
        assert entry['standard_error'] > 0 and entry['reference']['labels_sha256'] == real.record['labels_sha256']


@pytest.mark.slow
def test_guidance_of_scale_1_changes_no_bit_and_others_have_folders_of_their_own(trained):
    ask = [
        {},
        {'sample__guidance': 1.0, 'sample__guidance_interval': (0.1, 0.2)},
        {'sample__guidance': 2.0},
        {'sample__guidance': 2.0, 'sample__guidance_interval': (50.0, 60.0)},  # no level is so noisy
        {'sample__guidance': 2.0, 'sample__guidance_interval': (0.0, 100.0)},  # all are
    ]
    found = [draw(trained, conditional(**changes)) for changes in ask]
    images, names = [one[0] for one in found], [one[4].name.partition('-')[2] for one in found]
    np.testing.assert_array_equal(images[1], images[0])
    assert (images[2] != images[0]).any((1, 2, 3)).all() and found[2][3]['guidance'] == 2
    for one, other in ((3, 0), (4, 2)):  # other programs, so up to rounding
        assert np.abs(images[one].astype(int) - images[other]).max() <= 1
    assert names[0] == names[1] and len(set(names)) == 4


@pytest.mark.slow
def test_a_weaker_checkpoint_guides(trained, tmp_path):
    """Also a narrower and unconditional one. The same checkpoint changes nothing: nothing is weaker."""
    itself = conditional(sample__guidance=3.0, sample__guide=str(trained))
    images, _, _, record, folder = draw(trained, itself)
    assert record['guide']['checkpoint_step'] == 12 and record['guide']['params_sha256'] == record['params_sha256']
    assert str(trained) not in json.dumps(record)
    np.testing.assert_array_equal(images, draw(trained, conditional())[0])
    weak = quick({'model.channels': 4})
    make_run(tmp_path / 'weak', weak, 3, params=random_params(weak, 3), ema=random_params(weak, 4))
    by_other = draw(trained, conditional(sample__guidance=3.0, sample__guide=str(tmp_path / 'weak')))
    assert (by_other[0] != images).any((1, 2, 3)).all() and by_other[4].name != folder.name
    assert by_other[3]['guide']['model']['channels'] == 4
    unconditional = quick(SAMPLE)
    model = make_run(
        tmp_path / 'model',
        unconditional,
        3,
        params=random_params(unconditional, 5),
        ema=random_params(unconditional, 6),
    )
    unconditional.sample.update(guidance=2.0, guide=str(tmp_path / 'weak'))
    guided, labels, _, _, _ = draw(model, unconditional)
    assert labels is None and guided.std() > 0
    other = quick({'schedule.T': 8})
    make_run(tmp_path / 'other', other, 3, params=random_params(other, 3), ema=random_params(other, 4))
    for guide, words in (('other', r'schedule.T=8, but this run has 4'), ('nothing', 'there is no run in')):
        with pytest.raises(RunError, match=rf'config.sample.guide=.*{guide}: .*{words}'):
            sample.run(conditional(sample__guidance=2.0, sample__guide=str(tmp_path / guide)), str(trained))


def test_a_sweep_draws_the_classes_that_are_asked_for(trained):
    """Its images are those of --mode=sample, guided as well."""
    config = conditional(sample__guidance=2.0, sample__labels='3', sample__metrics=())
    config.sweep.update(num_steps=(3,), etas=(0.0,), large=False)
    assert sweep.run(config, str(trained)) == 0
    (cell,) = trained.glob('sweep/*/cells/*.npy')
    np.testing.assert_array_equal(np.load(cell), draw(trained, config)[0][:4])


@pytest.mark.slow
def test_a_plan_counts_the_work_of_guidance(trained, tmp_path):
    """Twice that of the network, and all programs of a conditional network are planned."""
    work = []
    for changes in ({}, {'guidance': 2.0}, {'guidance': 2.0, 'guide': str(trained)}):
        config = conditional(**{f'sample__{key}': value for key, value in changes.items()})
        assert plan.run(config, str(tmp_path / str(len(work)))) == 0
        (record,) = (tmp_path / str(len(work)) / 'plan').glob('*.json')
        work.append(json.loads(record.read_text())['programs']['sample']['flops_per_image'])
    assert work[1] == work[2] == pytest.approx(2 * work[0])


def test_a_run_from_before_there_were_labels_is_used_as_before(tmp_path):
    config = quick(SAMPLE)
    make_run(tmp_path, config, 3, params=random_params(config, 1), ema=random_params(config, 2))
    stored = json.loads((tmp_path / 'config.json').read_text())
    for key in ('data.labels', 'model.num_classes', 'train.label_dropout', 'sample.guidance', 'sample.labels'):
        part, name = key.split('.')
        del stored[part][name]
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    images, labels, _, _, folder = draw(tmp_path, quick(SAMPLE))
    assert len(images) == 7 and labels is None and 'guidance' not in folder.name


# Likelihoods.


@pytest.mark.slow
def test_likelihoods_are_given_the_class_of_each_image_and_listed_by_class(trained):
    ask = {'num_images': 60, 'batch_size': 25, 'samples': 2, 'quantities': ('posterior', 'importance')}
    config = conditional(**{f'likelihood__{key}': value for key, value in ask.items()})
    assert likelihood.run(config, str(trained)) == 0
    (folder,) = (trained / 'likelihood').iterdir()
    ledger = json.loads((folder / 'ledger.json').read_text())
    digits = sources.open_source('digits', 'test')
    classes = np.array([digits.label(i) for i in range(60)])
    assert [found['label'] for found in ledger['classes']] == sorted(set(classes.tolist()))
    for i, whole in enumerate(ledger['rows'][:4]):
        mine = [found['rows'][i] for found in ledger['classes']]
        assert [row['n'] for row in mine] == np.bincount(classes).tolist()
        assert np.average([row['nats'] for row in mine], weights=[row['n'] for row in mine]) == pytest.approx(
            whole['nats']
        )
    lines = (folder / 'ledger.md').read_text().splitlines()
    assert sum(line.startswith(f'| {i} | ') for line in lines for i in range(10)) == len(set(classes))

    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(trained), 'ema')
    posterior = likelihood.quantities(config, exp)['posterior']
    x0 = data.to_float(build.load_images(config, 'test')[:25])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(25))
    right, wrong = (
        posterior(keys, params, x0, jnp.int32(c[:25]))['consistency'] for c in (classes, (classes + 1) % 10)
    )
    assert (np.abs(right - wrong).max(1) > 1e-3).all()


# What is refused.


def refused(mode, config, path, *words):
    with pytest.raises(RunError) as error:
        mode.run(config, str(path))
    for word in words:
        assert word in str(error.value), str(error.value)
    assert '\n' not in str(error.value)


def test_training_with_labels_that_are_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    png = encoded(noise(1, 8, 8, 1)[0])
    flat = fill(tmp_path / 'flat', {f'{i}.png': png for i in range(20)})
    loose = fill(tmp_path / 'loose', {'a/1.png': png, 'b/1.png': png, '1.png': png})
    for folder, why in ((flat, 'no classes'), (loose, '1 of 3 pictures')):
        config = quick(LABELLED | {'data.source': f'folder:{folder}'})
        refused(train, config, tmp_path / 'run', 'config.data.labels', why, '--config.data.labels=False')
    refused(
        train, quick({'train.label_dropout': 0.1}), tmp_path / 'run', 'config.train.label_dropout', 'data.labels=True'
    )
    refused(train, quick({'model.num_classes': 3}), tmp_path / 'run', 'config.model', 'num_classes is 3', 'data.labels')
    refused(train, conditional(model__num_classes=7), tmp_path / 'run', '10 classes', 'model.num_classes is 7')
    monkeypatch.setitem(NETWORKS, 'blind', lambda *, image_channels, rngs: None)
    refused(train, conditional(model__network='blind'), tmp_path / 'run', "network is 'blind'", 'use one of unet')
    assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'labels': '3,10'}, ('sample.labels has 10', '0 to 9')),
        ({'labels': 'cat'}, ("sample.labels is 'cat'", "'all', 'none'", "'0,3,7'")),
        ({'labels': '-1'}, ("sample.labels is '-1'",)),
        ({'labels': 'none', 'guidance': 2.0}, ("sample.labels='none'", 'guidance=1')),
        ({'guidance': -1.0}, ('sample.guidance is -1',)),
        ({'guidance_interval': (3.0, 1.0)}, ('sample.guidance_interval', '(0.3,3)')),
        ({'guidance_interval': (3.0,)}, ('sample.guidance_interval',)),
        ({'guide': 'x'}, ('sample.guide', 'sample.guidance=1')),
    ],
)
def test_what_a_conditional_run_cannot_draw_is_refused(trained, changes, words):
    refused(sample, conditional(**{f'sample__{key}': value for key, value in changes.items()}), trained, *words)


def test_guidance_needs_an_unconditional_model(tmp_path):
    config = quick(SAMPLE)
    make_run(tmp_path / 'unconditional', config, 3, params=random_params(config, 1), ema=random_params(config, 2))
    for mode in (sample, sweep):
        config.sample.update(guidance=2.0, labels='all')
        config.sweep.num_steps = (3,)
        words = ('config.sample.guidance is 2', 'unconditional', 'data.labels=True', 'sample.guide')
        refused(mode, config, tmp_path / 'unconditional', *words)
        config.sample.update(guidance=1.0, labels='3')
        refused(mode, config, tmp_path / 'unconditional', "config.sample.labels is '3'", 'data.labels=True')
    config = conditional(train__label_dropout=0.0)
    make_run(tmp_path / 'no-dropout', config, 3, params=random_params(config, 1), ema=random_params(config, 2))
    assert draw(tmp_path / 'no-dropout', config)[1].tolist() == list(range(7))
    config.train.label_dropout = 0.1  # of this command; the run had none
    for changes in ({'guidance': 2.0}, {'labels': 'none'}):
        config.sample.update({'guidance': 1.0, 'labels': 'all'} | changes)
        (key,) = changes
        refused(sample, config, tmp_path / 'no-dropout', f'config.sample.{key}', 'train.label_dropout=0.1')


def test_labels_cannot_be_turned_on_or_exported_later(trained, tmp_path):
    config = quick(SAMPLE)
    make_run(tmp_path, config, 3, params=random_params(config, 1), ema=random_params(config, 2))
    with pytest.raises(RunError, match=r'config.data.labels: False there, True asked'):
        sample.run(conditional(), str(tmp_path))
    refused(export, conditional(), trained, "network is 'two layers'", 'diffusers')


def test_the_configs_are_those_they_are_named_after_with_labels():
    for module in (digits_conditional, cifar10_conditional):
        config = module.get_config()
        assert config.data.labels and config.train.label_dropout == 0.1 and config.sample.guidance == 1.5
