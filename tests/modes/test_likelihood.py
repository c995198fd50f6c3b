"""--mode=likelihood on a tiny run: every image once, stopped and resumed, and what it refuses."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion import build, data, workdir
from diffusion.likelihood import decoder
from diffusion.modes import likelihood
from diffusion.report.terms import save_terms
from diffusion.runtime.interrupt import EXIT_STATUS
from diffusion.util import RunError
from tests.runs import make_run, quick, random_params, tiny

ASK = {'num_images': 11, 'batch_size': 4, 'samples': 2, 'rtol': 1e-2, 'atol': 1e-2}


def asking(config=quick, **changes):
    """A config that asks for a few images; the names of `changes` are keys of config.likelihood."""
    return config({f'likelihood.{key}': value for key, value in (ASK | changes).items()})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workdir with a checkpoint of step 12."""
    config = asking()
    params, ema = random_params(config, 1), random_params(config, 2)
    return make_run(tmp_path_factory.mktemp('run'), config, 12, params=params, ema=ema)


def folders(path):
    return set((path / 'likelihood').iterdir()) if (path / 'likelihood').exists() else set()


def compute(path, config):
    """Run --mode=likelihood. Returns its folder and ledger.json."""
    before = folders(path)
    assert likelihood.run(config, str(path)) == 0
    (folder,) = folders(path) - before
    return folder, json.loads((folder / 'ledger.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def whole(trained):
    """All quantities."""
    return compute(trained, asking())


def test_the_files_and_the_rows_of_the_ledger(whole):
    folder, ledger = whole
    assert {path.name for path in folder.iterdir()} == {'ledger.json', 'ledger.md', 'terms.png', 'parts'}
    assert {row['n'] for row in ledger['rows']} == {11}
    names = [row['quantity'] for row in ledger['rows']]
    for name in ('ELBO, posterior form: total', 'ELBO, transition form: total', 'flow: total, of its own model'):
        assert name in names
    assert any('K = 2' in name for name in names) and names[-1].startswith('gap')
    table = (folder / 'ledger.md').read_text(encoding='utf-8')
    assert all(name.replace('|', r'\|') in table for name in names)
    assert 'Eq. (9) is no likelihood' in table  # so that its bits/dim puzzle nobody
    assert ledger['settings']['checkpoint_step'] == 12 and ledger['solver']['steps_mean'] > 0
    assert ledger['solver']['divergence'] == '2 Rademacher probes per image'
    assert set(ledger['error_of_the_draws']) == {'posterior', 'transition', 'printed', 'flow'}
    for quantity, error in ledger['error_of_the_draws'].items():
        errors = []  # of each image; they are independent
        for path in (folder / 'parts').glob(f'{quantity}-*'):
            with np.load(path) as arrays:
                errors.extend(arrays['error'])
        assert len(errors) == 11 and min(errors) > 0
        assert error == pytest.approx(np.linalg.norm(np.float64(errors)) / 11)


@pytest.mark.slow
def test_a_few_levels_estimate_the_sum_over_all(trained, whole, monkeypatch):
    """Two of three consistency terms are drawn: another sum, within its errors of the whole; they are plotted."""
    plotted = []
    monkeypatch.setattr(likelihood, 'save_terms', lambda *args: (plotted.append(args), save_terms(*args)))
    folder, ledger = compute(trained, asking(quantities=('posterior',), levels=2))
    name = 'ELBO, posterior form: consistency'
    (few,), (every,) = ([row for row in record['rows'] if row['quantity'] == name] for record in (ledger, whole[1]))
    errors = [record['error_of_the_draws']['posterior'] for record in (ledger, whole[1])]
    assert few['nats'] != every['nats']
    assert abs(few['nats'] - every['nats']) < 4.5 * np.hypot(*errors)
    assert (folder / 'terms.png').exists()
    ((_, levels, forms),) = plotted
    np.testing.assert_array_equal(levels, [3, (2 + 1) / 2])  # the first drawn term has s = 3, the second 2 or 1
    np.testing.assert_allclose((forms['posterior form'] @ [1, 2]).mean(), few['nats'], rtol=1e-5)


def test_the_plot_shows_the_mean_and_the_spread_of_the_terms(tmp_path, monkeypatch):
    """With the sign of a KL."""
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    terms = -np.array([[1.0, 10.0], [3.0, 20.0]])
    save_terms(str(tmp_path / 'terms.png'), [2, 1], {'one': terms, 'two': 2 * terms})
    ((means, spreads),) = (figure.axes for figure in figures)
    for i, scale in enumerate([1, 2]):
        np.testing.assert_allclose(means.lines[i].get_xydata(), [[2, scale * 2], [1, scale * 15]])
        np.testing.assert_allclose(spreads.lines[i].get_xydata(), [[2, scale * 1], [1, scale * 5]])
        band = means.collections[i].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((scale * 1.2, scale * 19))


@pytest.mark.slow
def test_every_image_is_counted_once(trained, monkeypatch):
    """If the decoder returns the sum over the image, the ledger has the mean of that over the 11 images."""
    monkeypatch.setattr('diffusion.likelihood.chain.log_likelihood', lambda x0, *_, **__: decoder.per_image(x0))
    _, ledger = compute(trained, asking(quantities=('posterior',), seed=3))
    images = data.to_float(data.load('digits', 'test', image_size=8, channels=1)[:11])
    row = next(row for row in ledger['rows'] if row['quantity'].endswith('reconstruction'))
    assert row['nats'] == pytest.approx(images.sum((1, 2, 3)).mean(), rel=1e-5)


def values_of_parts(monkeypatch, path, function, **asked):
    """{file: what it holds}, with function(keys, params, x0) → (B,) in place of the importance-weighted bound."""
    program = {'importance': lambda key, params, x0: {'log_weight': function(key, params, x0)}}
    monkeypatch.setattr(likelihood, 'quantities', lambda config, exp: program)
    folder, _ = compute(path, asking(quantities=('importance',), **asked))
    parts = {}
    for file in (folder / 'parts').iterdir():
        with np.load(file) as arrays:
            parts[file.name] = arrays['log_weight']
    return parts


def test_parts_of_other_images_are_not_reused(trained, monkeypatch):
    """The weights and settings are the same, but the images are others."""
    real = data.load
    mean = functools.partial(values_of_parts, monkeypatch, trained, lambda key, params, x0: x0.mean((1, 2, 3)))
    some = mean(seed=16)

    def other(*args, **kwargs):
        images = real(*args, **kwargs)
        return data.Images(255 - images.images, None, images.record | {'sha256': 'of others'})

    monkeypatch.setattr(data, 'load', other)
    others = mean(seed=16)
    assert some.keys() == others.keys()
    for name, values in some.items():
        np.testing.assert_allclose(others[name], -values, atol=1e-6)


@pytest.mark.slow
def test_the_flow_of_a_u_net_that_was_trained_with_remat(tmp_path):
    """The flow needs forward-mode derivatives, which recomputed layers do not have."""
    config = asking(tiny, quantities=('flow',), seed=17)
    config.model.remat = True
    params = random_params(config, 1)
    make_run(tmp_path, config, 12, params=params, ema=params)
    _, ledger = compute(tmp_path, config)
    assert all(np.isfinite(row['nats']) for row in ledger['rows'])


def test_each_trajectory_of_each_image_has_noise_of_its_own(trained, monkeypatch):
    def noise(keys, params, x0):
        return jax.vmap(jax.random.normal)(keys)

    parts = values_of_parts(monkeypatch, trained, noise, seed=5)
    draws = np.concatenate(list(parts.values()))
    assert len(parts) == 2 * 3 and len(draws) == len(set(draws)) == 2 * 11


@pytest.mark.slow
def test_the_estimate_of_an_image_does_not_depend_on_its_batch(trained, whole):
    """Batches of 11 instead of 4, the last of which is filled up: the same draws of levels and noise for each image."""
    folders = [whole[0], compute(trained, asking(quantities=('posterior', 'importance'), batch_size=11))[0]]
    for name, part in (
        ('posterior-0', 'consistency'),
        ('posterior-0', 'reconstruction'),
        ('importance-1', 'log_weight'),
    ):
        values = []
        for folder in folders:
            arrays = [np.load(path)[part] for path in sorted((folder / 'parts').glob(f'{name}-*'))]
            values.append(np.concatenate(arrays))
        assert len(values[0]) == 11 and len(np.unique(values[0][..., None][:, 0])) == 11
        np.testing.assert_allclose(*values, rtol=1e-4)


def test_parts_of_other_weights_are_not_reused(tmp_path, monkeypatch):
    """A run that was trained again in the same place has the same step and settings."""
    config = asking()
    found = []
    for name, seed in [('first', 1), ('again', 2)]:
        params = random_params(config, seed)
        path = make_run(tmp_path / name, config, 12, params=params, ema=params)
        if found:
            shutil.copytree(tmp_path / 'first' / 'likelihood', path / 'likelihood')
        sums = values_of_parts(
            monkeypatch, path, lambda key, params, x0: sum(leaf.sum() for leaf in jax.tree.leaves(params))
        )
        found.append(sums)
        expected = sum(leaf.sum(dtype=np.float64) for leaf in jax.tree.leaves(params))
        np.testing.assert_allclose(np.concatenate(list(sums.values())), expected, rtol=1e-4)


def test_likelihoods_are_computed_in_full_precision(trained, monkeypatch):
    """Also of a network that was trained in bfloat16."""
    traced, of_config = [], likelihood.quantities

    def tracing(config, exp):
        def trace(key, params, x0):
            traced.append(str(jax.make_jaxpr(of_config(config, exp)['importance'])(key, params, x0)))
            return {'log_weight': jnp.zeros(len(x0))}

        return {'importance': trace}

    monkeypatch.setattr(likelihood, 'quantities', tracing)
    config = asking(quantities=('importance',), seed=6)
    config.model.dtype = 'bfloat16'
    config.model.implementation = 'plain'  # its convolutions are XLA's
    compute(trained, config)
    *_, program = traced
    assert 'conv_general_dilated' in program and 'bf16' not in program
    assert set(re.findall(r' precision=(.*)', program)) == {'(Precision.HIGHEST, Precision.HIGHEST)'}


def test_stopped_and_resumed_gives_the_same(trained, monkeypatch, capsys):
    """A signal arrives after the third part: the progress is reported, and the same command completes it."""
    config = asking(quantities=('importance',))
    unbroken, ledger = compute(trained, config)
    unbroken = unbroken.rename(trained / 'unbroken')
    save, written = likelihood._save, []

    def save_and_signal(path, arrays):
        save(path, arrays)
        written.append(path)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(likelihood, '_save', save_and_signal)
    before = folders(trained)
    assert likelihood.run(config, str(trained)) == EXIT_STATUS
    assert '3 of 6 parts' in capsys.readouterr().out
    for _ in range(2):  # the second time nothing is left to do
        assert likelihood.run(config, str(trained)) == 0
        assert len(written) == 6 == len(set(written))
    (folder,) = folders(trained) - before
    assert json.loads((folder / 'ledger.json').read_text(encoding='utf-8')) == ledger
    for path in (unbroken / 'parts').iterdir():
        with np.load(path) as old, np.load(folder / 'parts' / path.name) as new:
            np.testing.assert_array_equal(old['log_weight'], new['log_weight'])


@pytest.mark.parametrize(
    'change, message',
    [
        ({'num_images': 1000}, '299'),
        ({'num_images': -1}, 'num_images'),
        ({'split': 'valid'}, r"config\.likelihood\.split='valid': split is"),
        ({'quantities': ('elbo',)}, "'posterior', 'transition'"),
        ({'quantities': ()}, "'posterior', 'transition'"),
        ({'samples': 0}, 'samples'),
        ({'levels': -1}, 'levels'),
        ({'levels': 99}, 'levels'),
        ({'eta': 0.0}, 'no bound'),
        ({'variance': 'huge'}, "'small', 'large'"),
        ({'variance': 'large', 'eta': 0.5}, "variance 'large' .* eta=1, not to eta=0.5"),
        ({'num_steps': 5}, '1 to 4'),
        ({'rtol': 0.0}, 'rtol'),
        ({'weights': 'best'}, "'ema', 'raw'"),
    ],
)
def test_a_wrong_likelihood_setting_is_named(trained, change, message):
    with pytest.raises(RunError, match=message):
        likelihood.run(asking(**change), str(trained))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'eta': 0.0}, r'config\.likelihood: eta is 0.0.* there is no bound'),
        ({'levels': 99}, r'config\.likelihood: levels is 99.* 3 consistency'),
        ({'num_steps': 5}, r'config\.likelihood: num_steps is 5'),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_is_read(trained, monkeypatch, change, message):
    for module, name in ((workdir, 'load_params'), (build, 'load_images')):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail('something is read'))
    with pytest.raises(RunError, match=message):
        likelihood.run(asking(**change), str(trained))


def test_a_workdir_in_which_no_ledger_can_be_written_is_refused_before_it_is_computed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(build, 'load_images', lambda *_: pytest.fail('images are read'))
    run = shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('likelihood'))
    (run / 'likelihood').write_text('not a folder')
    with pytest.raises(RunError, match=r'/likelihood cannot be written .*--workdir'):
        likelihood.run(asking(), str(run))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ledger.json.new', 'ledger.md', 'terms.png', 'parts/posterior-0-00000000.npz.new'])
def test_a_failed_write_is_reported_in_one_line(trained, tmp_path, name):
    """As on a disk that fills up: here a folder has the name of the file."""
    run = shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('likelihood', 'unbroken'))
    config = asking(quantities=('posterior',), num_images=2, batch_size=2)
    folder, _ = compute(run, config)
    shutil.rmtree(folder)
    (folder / name).mkdir(parents=True)
    with pytest.raises(RunError, match=rf'{folder.name} cannot be written .*free some space'):
        likelihood.run(config, str(run))


def test_a_workdir_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match='train one with --mode=train'):
        likelihood.run(asking(), str(tmp_path))


def test_first_images_of_a_split_that_is_sorted_by_class_are_warned_of():
    images = data.Images(np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 0, 1, 1, 2, 2], np.int32), {})
    assert 'first 3 images are of 2 of 3 classes' in likelihood.one_sided(images, 3)
    mixed = dataclasses.replace(images, labels=np.array([0, 2, 1, 1, 2, 0], np.int32))
    for fine, count in ((images, 6), (images, 5), (mixed, 1), (dataclasses.replace(images, labels=None), 3)):
        assert likelihood.one_sided(fine, count) == ''
