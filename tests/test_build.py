"""From a config to objects: each part is what the config asks for, and errors name the key."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion import build, schedule
from diffusion.networks import IMPLEMENTATIONS, NETWORKS, make_rngs
from diffusion.runtime import hosts, mesh
from diffusion.util import RunError
from tests.runs import quick, tiny


@pytest.mark.parametrize('name', schedule.SCHEDULES)
def test_a_schedule_gets_its_parameters_by_name(name):
    config = tiny({'schedule.name': name, 'schedule.offset': 0.01, 'schedule.max_beta': 0.9}).schedule
    given = {
        'linear': dict(beta_start=0.1, beta_end=0.5),
        'quadratic': dict(beta_start=0.1, beta_end=0.5),
        'sigmoid': dict(beta_start=0.1, beta_end=0.5),
        'constant': dict(beta_end=0.5),
        'cosine': dict(offset=0.01, max_beta=0.9),
        'jsd': {},
    }[name]
    expected = schedule.SCHEDULES[name](4, **given)
    np.testing.assert_array_equal(build.make_schedule(config).log_alpha_bar, expected.log_alpha_bar)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'schedule.beta_end': 0.0}, ['config.schedule (', "name='linear'", 'beta_end=0.0']),
        ({'schedule.beta_end': 1.0}, ['config.model.kind', "'x0'", "'v'"]),
        ({'schedule.name': 'jsd'}, ['config.model.kind', "'jsd'"]),
        ({'mesh.fsdp': 3}, ['config.mesh', '3']),
        ({'model.groups': 3}, ['config.model', 'groups']),
        ({'model.channels': 2}, ['config.model', 'channels']),
    ],
)
def test_an_impossible_config_is_refused_by_its_key(changes, words):
    with pytest.raises(RunError) as error:
        build.build(tiny(changes))
    for word in words:
        assert word in str(error.value)


def test_a_schedule_that_does_not_end_at_noise_is_told(capsys):
    """The defaults of DDPM with a tenth of its levels; `cosine` ends at noise for any number."""
    few = {'schedule.T': 100, 'schedule.beta_start': 1e-4, 'schedule.beta_end': 0.02}
    build.build(quick(few))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('warning: config.schedule: √ᾱ_t is 0.60 at t=100 of T=100')
    assert 'schedule.beta_end' in line and 'schedule.name=cosine' in line
    for changes in ({'schedule.beta_end': 0.2}, {'schedule.T': 1000}, {'schedule.name': 'cosine'}):
        build.build(quick(few | changes))
        assert capsys.readouterr().out == ''


def devices_of(platform):
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))


@pytest.mark.parametrize(
    ('key', 'value', 'told'),
    [
        ('model.num_heads', 4, "config.model.num_heads has no effect on 'unet', only on adm\n"),
        ('schedule.offset', 0.01, "config.schedule.offset has no effect on 'linear', only on cosine\n"),
        ('model.channels', 8, ''),
        ('schedule.beta_end', 0.03, ''),
        ('model.kind', 'v', ''),  # which no network takes
    ],
)
def test_a_key_that_the_network_or_schedule_does_not_take_is_told(capsys, key, value, told):
    config = tiny({key: value})
    config.command.overrides = (key,)
    build.build(config)
    assert [line for line in capsys.readouterr().out.splitlines(keepends=True) if 'no effect' in line] == (
        [f'warning: {told}'] if told else []
    )


def test_auto_is_the_implementation_for_the_devices():
    found = {platform: build._implementation('auto', devices_of(platform)) for platform in ('cpu', 'gpu', 'tpu')}
    assert found == {'cpu': 'cpu', 'gpu': 'gpu', 'tpu': 'plain'}
    assert build._implementation('plain', devices_of('cpu')) == 'plain'
    assert build._implementation('cpu', devices_of('gpu')) == 'cpu'


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_the_implementation_that_is_asked_for_is_used(name):
    exp = build.build(tiny({'model.implementation': name}))
    assert exp.implementation is IMPLEMENTATIONS[name]
    network = nnx.eval_shape(lambda: exp.network.make(make_rngs(default=0)))
    assert type(network) is (NETWORKS | IMPLEMENTATIONS[name].NETWORKS)['unet']


class Told(nnx.Module):
    """Returns the noise level that it is called with, plus 100 if it has dropout."""

    def __init__(self, *, image_size, image_channels, dtype, channels, rngs):
        self.given = (image_size, image_channels, dtype, channels)
        self.shift = nnx.Param(jnp.zeros(()))

    def __call__(self, x, t, *, deterministic=True, rngs=None):
        if not deterministic:
            rngs.dropout()  # the stream exists
        return jnp.zeros_like(x) + t[:, None, None, None] + self.shift[...] + (0 if deterministic else 100)


def test_a_network_gets_the_keys_that_it_names(monkeypatch):
    monkeypatch.setitem(NETWORKS, 'told', Told)
    exp = build.build(tiny({'model.network': 'told', 'model.dtype': 'bfloat16'}))
    assert exp.network.make(make_rngs(default=0)).given == (8, 1, jnp.bfloat16, 8)


@pytest.mark.parametrize('first_level', [0, 1])
def test_a_network_counts_levels_from_its_first(monkeypatch, first_level):
    """Weights trained by others have learned 0 … T−1 for our levels 1 … T."""
    monkeypatch.setitem(NETWORKS, 'told', Told)
    network = build.build(tiny({'model.network': 'told', 'model.first_level': first_level})).network
    params = network.init(jax.random.key(0))
    x, t = jnp.zeros((2, 8, 8, 1)), jnp.array([1, 4])
    shift = 1 - first_level
    assert network.net(params)(x, t)[:, 0, 0, 0].tolist() == [1 - shift, 4 - shift]
    assert network.net(params, dropout_key=jax.random.key(1))(x, t)[0, 0, 0, 0] == 101 - shift
    scaled = dataclasses.replace(network, level_scale=0.25)  # as where T = 4000 levels were trained as 0 … 1000
    assert scaled.net(params)(x, t)[:, 0, 0, 0].tolist() == [(1 - shift) / 4, (4 - shift) / 4]


def test_a_run_starts_with_equal_averages_and_counts_of_zero():
    exp = build.build(quick())
    state = exp.init(jax.random.key(0))
    assert (int(state.step), int(state.skipped.total), int(state.skipped.in_a_row)) == (0, 0, 0)
    for param, average in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(param, average)
        assert param.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()  # both will be donated
    abstract = exp.abstract_state()
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for leaf, expected in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype) and leaf.sharding.mesh == exp.mesh


@pytest.mark.parametrize(
    ('warmup', 'updates', 'rate'), [(0, 0, 0.1), (4, 0, 0.025), (4, 2, 0.075), (4, 3, 0.1), (4, 99, 0.1)]
)
def test_the_learning_rate_rises_linearly_and_stays(warmup, updates, rate):
    config = tiny({'train.learning_rate': 0.1, 'train.warmup_steps': warmup}).train
    assert float(build.make_optimizer(config)[1](updates)) == pytest.approx(rate)


def test_images_are_loaded_as_config_data_asks(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        build.data, 'load', lambda source, split, **keys: asked.update(keys, source=source, split=split)
    )
    config = tiny({'data.crop': 'center', 'data.max_bad_fraction': 0.5, 'data.cache': False, 'data.cache_dir': '/x'})
    build.load_images(config, 'test')
    assert asked == {
        'source': 'digits',
        'split': 'test',
        'image_size': 8,
        'channels': 1,
        'crop': 'center',
        'data_dir': '',
        'cache': False,
        'cache_dir': '/x',
        'max_bad_fraction': 0.5,
        'max_pixels': config.data.max_pixels,
        'num_shards': 1,
    }


def test_images_that_cannot_be_loaded_are_refused_by_key():
    with pytest.raises(RunError, match=r"config\.data: source is 'digit'"):
        build.load_images(tiny({'data.source': 'digit'}))
    with pytest.raises(RunError, match=r"config\.likelihood\.split='valid': split is 'valid'"):
        build.load_images(tiny(), 'valid', 'likelihood.split')


@pytest.mark.parametrize(('mode', 'cores'), [('sample', [3]), ('train', []), ('likelihood', [])])
def test_only_sampling_makes_each_core_a_device(monkeypatch, mode, cores):
    """As many as images are drawn at a time, at most."""
    asked = []
    monkeypatch.setattr(mesh, 'use_cores', asked.append)
    monkeypatch.setattr(hosts, 'connect', lambda **settings: None)
    build.join_hosts(quick({'sample.num_images': 3, 'sample.batch_size': 8}), mode)
    assert asked == cores


def test_a_value_that_differs_between_hosts_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(hosts, 'differences', lambda values: dict.fromkeys(values, 'process 0 has 1, process 1 has 2'))
    with pytest.raises(RunError) as error:
        build.require_same({'config.seed': '1', '--mode': 'train'}, 'Start all hosts alike.')
    assert str(error.value).splitlines() == [
        'config.seed and --mode are not the same on all hosts',
        '    config.seed: process 0 has 1, process 1 has 2',
        '    --mode: process 0 has 1, process 1 has 2',
        'Start all hosts alike.',
    ]
    monkeypatch.setattr(hosts, 'differences', lambda values: {})
    build.require_same({'config.seed': '1'}, '')
