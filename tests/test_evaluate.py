"""--mode=likelihood on a tiny run: every image once, stopped and gone on with, and what it refuses."""

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

from diffusion import data, evaluate, experiment
from diffusion.experiment import RunError
from diffusion.likelihood import decoder
from diffusion.report.terms import save_terms
from diffusion.runtime.interrupt import EXIT_STATUS
from tests.test_generate import make_run, random_params
from tests.test_train import tiny

ASK = {'num_images': 11, 'batch_size': 4, 'samples': 2, 'rtol': 1e-2, 'atol': 1e-2}


def asking(**changes):
    return tiny({f'likelihood.{key}': value for key, value in (ASK | changes).items()})


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    config = asking()
    params, ema = random_params(config, 1), random_params(config, 2)
    return make_run(tmp_path_factory.mktemp('run'), config, 12, params=params, ema=ema)


def folders(workdir):
    return set((workdir / 'likelihood').iterdir()) if (workdir / 'likelihood').exists() else set()


def compute(workdir, config):
    """Run --mode=likelihood. Returns its folder and ledger.json."""
    before = folders(workdir)
    assert evaluate.run(config, str(workdir)) == 0
    (folder,) = folders(workdir) - before
    return folder, json.loads((folder / 'ledger.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def whole(workdir):
    return compute(workdir, asking())


def test_files_rows_and_counts(whole):
    folder, ledger = whole
    assert {path.name for path in folder.iterdir()} == {'ledger.json', 'ledger.md', 'terms.png', 'parts'}
    assert {row['n'] for row in ledger['rows']} == {11}
    names = [row['quantity'] for row in ledger['rows']]
    for name in ('ELBO, posterior form: total', 'ELBO, transition form: total', 'flow: total, of its own model'):
        assert name in names
    assert any('K = 2' in name for name in names) and names[-1].startswith('gap')
    table = (folder / 'ledger.md').read_text(encoding='utf-8')
    assert all(name.replace('|', r'\|') in table for name in names)
    assert ledger['settings']['checkpoint_step'] == 12 and ledger['solver']['steps_mean'] > 0
    assert ledger['solver']['divergence'] == '2 Rademacher probes an image'
    errors = {row['quantity'].split(':')[0]: row['standard_error'] for row in ledger['rows']}
    assert set(ledger['error_of_the_draws']) == {'posterior', 'transition', 'printed', 'flow'}
    for form in ('posterior', 'transition'):
        assert 0 < ledger['error_of_the_draws'][form] < 2 * errors[f'ELBO, {form} form']


def test_a_few_levels_stand_for_all(workdir, whole, monkeypatch):
    """Two of three consistency terms, drawn: another sum, within its errors of the whole; they are plotted, too."""
    plotted = []
    monkeypatch.setattr(evaluate, 'save_terms', lambda *args: (plotted.append(args), save_terms(*args)))
    folder, ledger = compute(workdir, asking(quantities=('posterior',), levels=2))
    name = 'ELBO, posterior form: consistency'
    (few,), (every,) = ([row for row in record['rows'] if row['quantity'] == name] for record in (ledger, whole[1]))
    errors = [record['error_of_the_draws']['posterior'] for record in (ledger, whole[1])]
    assert few['nats'] != every['nats']
    assert abs(few['nats'] - every['nats']) < 4.5 * np.hypot(*errors)
    assert (folder / 'terms.png').exists()
    ((_, levels, forms),) = plotted
    np.testing.assert_array_equal(levels, [3, (2 + 1) / 2])  # the first term drawn is of s = 3, the second of 2 or 1
    np.testing.assert_allclose((forms['posterior form'] @ [1, 2]).mean(), few['nats'], rtol=1e-5)


def test_the_terms_are_drawn_as_they_are(tmp_path, monkeypatch):
    """Their means and the spread of the images, with the sign of a KL."""
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


def test_every_image_is_counted_once(workdir, monkeypatch):
    """With the decoder's answer replaced by the mean of the image, the ledger's is the mean over the 11 images."""
    monkeypatch.setattr('diffusion.likelihood.chain.log_likelihood', lambda x0, *_, **__: decoder.per_image(x0))
    _, ledger = compute(workdir, asking(quantities=('posterior',), seed=3))
    images = data.to_float(data.load('digits', 'test', image_size=8, channels=1)[:11])
    row = next(row for row in ledger['rows'] if row['quantity'].endswith('reconstruction'))
    assert row['nats'] == pytest.approx(images.sum((1, 2, 3)).mean(), rel=1e-5)


def told(monkeypatch, workdir, function, **asked):
    """What the parts hold, {file: (B,)}, with function(key, params, x0) in place of the importance-weighted bound."""
    program = {'importance': lambda key, params, x0: {'log_weight': function(key, params, x0)}}
    monkeypatch.setattr(evaluate, 'quantities', lambda config, exp: program)
    folder, _ = compute(workdir, asking(quantities=('importance',), **asked))
    parts = {}
    for path in (folder / 'parts').iterdir():
        with np.load(path) as arrays:
            parts[path.name] = arrays['log_weight']
    return parts


def test_parts_of_other_images_are_left_alone(workdir, monkeypatch):
    """The same weights and settings, but the images lie elsewhere and are others: none of the first's is taken."""
    mean, real = functools.partial(told, monkeypatch, workdir, lambda key, params, x0: x0.mean((1, 2, 3))), data.load
    some = mean(seed=16)

    def other(*args, **kwargs):
        images = real(*args, **kwargs)
        return data.Images(255 - images.images, None, images.record | {'sha256': 'of others'})

    monkeypatch.setattr(data, 'load', other)
    others = mean(seed=16)
    assert some.keys() == others.keys()
    for name, values in some.items():
        np.testing.assert_allclose(others[name], -values, atol=1e-6)


def test_the_flow_of_a_network_that_was_trained_with_remat(workdir):
    """The way forward through its layers has derivatives, too, which recomputed layers do not."""
    config = asking(quantities=('flow',), seed=17)
    config.model.remat = True
    _, ledger = compute(workdir, config)
    assert all(np.isfinite(row['nats']) for row in ledger['rows'])


def test_each_trajectory_of_each_image_has_noise_of_its_own(workdir, monkeypatch):
    def noise(key, params, x0):
        return jax.random.normal(key, x0.shape[:1])

    parts = told(monkeypatch, workdir, noise, seed=5)
    draws = np.concatenate(list(parts.values()))
    assert len(parts) == 2 * 3 and len(draws) == len(set(draws)) == 2 * 11


def test_what_was_computed_with_other_weights_is_not_taken_over(tmp_path, monkeypatch):
    """Of a run that was trained anew in its place: the same step, the same settings."""
    config = asking()
    found = []
    for name, seed in [('first', 1), ('anew', 2)]:
        params = random_params(config, seed)
        workdir = make_run(tmp_path / name, config, 12, params=params, ema=params)
        if found:
            shutil.copytree(tmp_path / 'first' / 'likelihood', workdir / 'likelihood')
        sums = told(monkeypatch, workdir, lambda key, params, x0: sum(leaf.sum() for leaf in jax.tree.leaves(params)))
        found.append(sums)
        expected = sum(leaf.sum(dtype=np.float64) for leaf in jax.tree.leaves(params))
        np.testing.assert_allclose(np.concatenate(list(sums.values())), expected, rtol=1e-4)


def test_likelihoods_are_computed_in_full_precision(workdir, monkeypatch):
    """Of a network that was trained in bfloat16, too."""
    traced, of_config = [], evaluate.quantities

    def tracing(config, exp):
        def trace(key, params, x0):
            traced.append(str(jax.make_jaxpr(of_config(config, exp)['importance'])(key, params, x0)))
            return {'log_weight': jnp.zeros(len(x0))}

        return {'importance': trace}

    monkeypatch.setattr(evaluate, 'quantities', tracing)
    config = asking(quantities=('importance',), seed=6)
    config.model.dtype = 'bfloat16'
    compute(workdir, config)
    *_, program = traced
    assert 'conv_general_dilated' in program and 'bf16' not in program
    assert set(re.findall(r' precision=(.*)', program)) == {'(Precision.HIGHEST, Precision.HIGHEST)'}


def test_stopped_and_gone_on_with_gives_the_same(workdir, monkeypatch, capsys):
    """A signal after the third part: it says how far it came; again, and all is that of the unbroken run."""
    config = asking(quantities=('importance',))
    unbroken, ledger = compute(workdir, config)
    unbroken = unbroken.rename(workdir / 'unbroken')
    save, saved = evaluate._save, []

    def save_and_signal(path, arrays):
        save(path, arrays)
        saved.append(path)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(evaluate, '_save', save_and_signal)
    before = folders(workdir)
    assert evaluate.run(config, str(workdir)) == EXIT_STATUS
    assert '3 of 6 parts' in capsys.readouterr().out
    for _ in range(2):  # the second time nothing is left to do
        assert evaluate.run(config, str(workdir)) == 0
        assert len(saved) == 6 == len(set(saved))
    (folder,) = folders(workdir) - before
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
        ({'quantities': ('elbo',)}, 'posterior, transition'),
        ({'samples': 0}, 'samples'),
        ({'levels': -1}, 'levels'),
        ({'levels': 99}, 'levels'),
        ({'eta': 0.0}, 'no bound'),
        ({'variance': 'huge'}, "'small', 'large'"),
        ({'num_steps': 5}, '1 to 4'),
        ({'rtol': 0.0}, 'rtol'),
        ({'weights': 'best'}, "'ema', 'raw'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_key(workdir, change, message):
    with pytest.raises(RunError, match=message):
        evaluate.run(asking(**change), str(workdir))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'eta': 0.0}, r'config\.likelihood: eta is 0.0.* there is no bound'),
        ({'levels': 99}, r'config\.likelihood: levels is 99.* 3 consistency'),
        ({'num_steps': 5}, r'config\.likelihood: num_steps is 5'),
    ],
)
def test_and_so_before_anything_is_read(workdir, monkeypatch, change, message):
    for name in ('load_params', 'load_images'):
        monkeypatch.setattr(experiment, name, lambda *_: pytest.fail('something is read'))
    with pytest.raises(RunError, match=message):
        evaluate.run(asking(**change), str(workdir))


def test_a_workdir_that_takes_no_ledger_is_refused_before_it_is_computed(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, 'load_images', lambda *_: pytest.fail('images are read'))
    run = shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('likelihood'))
    (run / 'likelihood').write_text('not a folder')
    with pytest.raises(RunError, match=r'/likelihood cannot be written to .*--workdir'):
        evaluate.run(asking(), str(run))


@pytest.mark.parametrize('name', ['ledger.json.new', 'ledger.md', 'terms.png', 'parts/posterior-0-00000000.npz.new'])
def test_what_cannot_be_written_later_is_one_line(workdir, tmp_path, name):
    """As a disk that fills up: here a folder lies where a file would."""
    run = shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('likelihood', 'unbroken'))
    config = asking(quantities=('posterior',), num_images=2, batch_size=2)
    folder, _ = compute(run, config)
    shutil.rmtree(folder)
    (folder / name).mkdir(parents=True)
    with pytest.raises(RunError, match=rf'{folder.name} cannot be written to .*make room'):
        evaluate.run(config, str(run))


def test_a_workdir_without_a_run(tmp_path):
    with pytest.raises(RunError, match='train one first'):
        evaluate.run(asking(), str(tmp_path))
