"""A config file outside the repository adds entries to the tables, trains and samples with them: CONTRIBUTING.md's."""

import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from diffusion import build, compat, gaussian, loss, networks, sampler, schedule
from diffusion.data import pictures, sources
from diffusion.likelihood import decoder, elbo
from diffusion.modes import sample, train
from diffusion.util import RunError
from tests.runs import ROOT, assert_refused, main, saved

BLOCKS = re.findall(r'^```python\n(.*?)^```$', (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M | re.S)
(MINE,) = (block for block in BLOCKS if block.startswith('# mine.py\n'))
TABLES = [
    schedule.SCHEDULES,
    schedule.SPACINGS,
    gaussian.KINDS,
    loss.WEIGHTINGS,
    sampler.RULES,
    compat.COMPAT,
    elbo.FORMS,
    decoder.DECODERS,
    networks.NETWORKS,
    networks.IMPLEMENTATIONS,
    sources.SOURCES,
    pictures.CROPS,
]
SHORT = {
    'train.num_steps': 3,
    'train.batch_size': 8,
    'train.log_every': 1,
    'train.sample_every': 0,
    'sample.num_images': 5,
    'sample.num_steps': 4,
    'compile_cache': 'off',
}


@pytest.fixture(autouse=True)
def tables():
    """Take out of the tables what a test adds."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def mine(tmp_path):
    """The file, in a folder of its own."""
    path = tmp_path / 'mine' / 'mine.py'
    path.parent.mkdir()
    path.write_text(MINE, encoding='utf-8')
    return path


def load(path):
    """The module, imported as --config does."""
    spec = importlib.util.spec_from_file_location('mine', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(config):
    """{table: the entry that the config uses}, for the four entries that the file adds."""
    return {
        'SCHEDULES': (schedule.SCHEDULES, config.schedule.name),
        'WEIGHTINGS': (loss.WEIGHTINGS, config.train.loss),
        'NETWORKS': (networks.NETWORKS, config.model.network),
        'SOURCES': (sources.SOURCES, config.data.source.partition(':')[0]),
    }


@pytest.mark.slow
def test_the_config_trains_and_samples_at_the_command_line(mine, tmp_path):
    """In processes that know nothing of it but --config; what it adds is in the checkpoint and in the records.

    The width that the first command line asks for need not be asked for again, but the config is needed.
    """
    path = tmp_path / 'run'
    command = [f'--config={mine}', f'--workdir={path}', *(f'--config.{key}={value}' for key, value in SHORT.items())]
    for mode in (['--config.model.width=16'], ['--mode=sample']):
        done = main(*command, *mode)
        assert done.returncode == 0, done.stderr
    assert saved(path) == [3]
    assert_refused(main(f'--workdir={path}', '--mode=sample'), 'config.model.width', f'--config={mine}')

    config = load(mine).get_config()
    config.model.width = 16
    stored = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    (record,) = (json.loads(file.read_text(encoding='utf-8')) for file in path.glob('samples/*/record.json'))
    for found in (stored, record):
        assert found['schedule']['name'] == config.schedule.name and found['model']['network'] == config.model.network
    pictures = sources.open_source(config.data.source, 'train')
    assert stored['images']['count'] == len(pictures) and stored['train']['loss'] == config.train.loss
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / 'checkpoints' / '3' / 'params')
    expected = jax.eval_shape(build.build(config).network.init, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert (
        record['count'] == 5
        and record['metrics'][0]['reference']['count'] == len(pictures)
        and record['metrics'][0]['reference']['source'] == config.data.source
    )
    (grid,) = path.glob('samples/*/grid.png')
    with Image.open(grid) as picture:
        assert np.ptp(np.asarray(picture)) > 0


@pytest.mark.slow
def test_every_entry_that_the_config_adds_is_called(mine, tmp_path, monkeypatch):
    """By the modes that need it: the loss and the source by training alone, schedule and network by both."""
    before = [set(table) for table in (schedule.SCHEDULES, loss.WEIGHTINGS, networks.NETWORKS, sources.SOURCES)]
    config = load(mine).get_config()
    config.update_from_flattened_dict(SHORT)
    calls = []

    def recorded(name, function):
        @functools.wraps(function)  # so that its parameters can be read
        def wrapper(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return wrapper

    for known, (label, (table, name)) in zip(before, names(config).items(), strict=True):
        assert name not in known and name in table, label
    for label in ('SCHEDULES', 'SOURCES'):
        table, name = names(config)[label]
        monkeypatch.setitem(table, name, recorded(label, table[name]))
    table, name = names(config)['WEIGHTINGS']
    parts = {part: recorded(part, f) for part, f in table[name]._asdict().items() if callable(f)}
    monkeypatch.setitem(table, name, table[name]._replace(**parts))
    network = networks.NETWORKS[config.model.network]
    monkeypatch.setattr(network, '__call__', recorded('NETWORKS', network.__call__))

    assert train.run(config, str(tmp_path / 'run')) == 0
    assert set(calls) == {'SCHEDULES', 'SOURCES', 'NETWORKS', 'levels', 'loss'}
    calls.clear()
    assert sample.run(config, str(tmp_path / 'run')) == 0
    assert {'SCHEDULES', 'NETWORKS'} <= set(calls) <= {'SCHEDULES', 'NETWORKS', 'SOURCES'}


@pytest.mark.slow
def test_a_key_of_its_own_is_changed_on_the_command_line_and_belongs_to_the_run(mine, tmp_path):
    config = load(mine).get_config()
    config.update_from_flattened_dict(SHORT | {'train.num_steps': 1})
    assert train.run(config, str(tmp_path / 'run')) == 0
    wider = [f'--config={mine}', f'--workdir={tmp_path / "run"}', f'--config.model.width={2 * config.model.width}']
    assert_refused(main(*wider), f'config.model.width: {config.model.width} there, {2 * config.model.width} asked')


def test_an_unknown_name_is_refused_with_the_entries_that_were_added(mine, tmp_path):
    config = load(mine).get_config()
    added = [name for _, name in names(config).values()]
    for key in ('schedule.name', 'train.loss', 'model.network', 'data.source'):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict({key: 'wrong'})
        with pytest.raises(RunError) as error:
            train.run(wrong, str(tmp_path / 'run'))
        assert any(name in str(error.value) for name in added), str(error.value)


@pytest.mark.parametrize(
    'block',
    [block for block in BLOCKS if block != MINE],
    ids=lambda block: re.search(r'^([A-Z]+)\[', block, re.M)[1],
)
def test_the_other_examples_of_contributing_work(block):
    """Each adds one entry to a table, which is then used by its name."""
    before = [dict(table) for table in TABLES]
    exec(compile(block, 'CONTRIBUTING.md', 'exec'), {'__name__': 'example'})
    ((table, (name,)),) = (
        (table, table.keys() - known) for table, known in zip(TABLES, before, strict=True) if table != known
    )
    linear, shape = schedule.linear(100, 1e-3, 0.2), (3, 4, 4, 1)
    x0, eps = jax.random.normal(jax.random.key(0), (2, *shape))
    t = np.array([1, 50, 100])
    x_t = gaussian.q_sample(linear, x0, t, eps)
    if table is schedule.SPACINGS:
        levels = schedule.timesteps(100, 5, name)
        assert len(levels) == 6 and levels[-1] == 0 and (np.diff(levels) < 0).all()
    elif table is gaussian.KINDS:
        found = gaussian.predict(linear, name, gaussian.target(linear, name, x0, t, eps), x_t, t)
        np.testing.assert_allclose(found.x0, x0, atol=1e-4)
        np.testing.assert_allclose(found.eps, eps, atol=1e-4)
    elif table is sampler.RULES:
        # For data that are a single image every deterministic rule is exact.
        only = jnp.full(shape[1:], 0.5)

        def net(x_t, t):
            return (x_t - gaussian.like(linear.signal(t), x_t) * only) / gaussian.like(linear.noise(t), x_t)

        keys = jax.random.split(jax.random.key(1), 3)
        how = dict(shape=shape[1:], timesteps=schedule.timesteps(100, 10), kind='eps', eta=0.0)
        images = sampler.sample(keys, linear, net, rule=name, **how)
        np.testing.assert_allclose(images, jnp.broadcast_to(only, shape), atol=1e-4)
    else:
        pytest.fail(f'no check of an example that adds {name!r}')
