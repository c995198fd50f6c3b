"""The configs that come with the project."""

import functools
import importlib
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion import autoconfig, build, compat, workdir
from diffusion.configs import default
from diffusion.data.pictures import CROPS
from diffusion.networks import NETWORKS
from tests.runs import ROOT

NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem not in ('__init__', 'workdir'))


@functools.cache
def _num_params(model, images):
    config = ConfigDict({'model': json.loads(model), 'data': json.loads(images)})
    shapes = jax.eval_shape(build.make_network(config, NETWORKS).init, jax.random.key(0))
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def num_params(config):
    """The number of parameters; it is computed once for all configs with the same network."""
    images = {key: config.data[key] for key in ('image_size', 'channels')}
    return _num_params(json.dumps(config.model.to_dict()), json.dumps(images))


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_complete_and_described(name):
    """It builds and adds no key; its docstring has the command and the right number of parameters."""
    module = importlib.import_module(f'diffusion.configs.{name}')
    config = module.get_config()
    reference = default.get_config()
    assert {p: set(v) if hasattr(v, 'items') else 0 for p, v in config.items()} == {
        p: set(v) if hasattr(v, 'items') else 0 for p, v in reference.items()
    }
    if name == 'folder':
        config.data.update(image_size=32, channels=3)
        config.model.update(autoconfig.choose_network(32, 1000, 'cpu'))
    workdir.check(config)
    build.make_schedule(config.schedule)
    build.make_optimizer(config.train)
    size = num_params(config)
    assert config.data.crop in CROPS and config.data.placement == 'auto'
    if name != 'default':
        assert f'diffusion --config={name} --workdir=' in module.__doc__
    if 'parameters' in module.__doc__:
        assert f'{size:,} parameters' in module.__doc__
    if config.data.source.startswith('tfds:') and name != 'default':
        assert f'make prepare DATASET={config.data.source[5:]}' in module.__doc__


def test_there_is_a_config_for_each_dataset():
    wanted = {'celeba', 'cifar10', 'mnist', 'lsun_church', 'lsun_bedroom', 'ffhq', 'imagenet64', 'folder', 'digits'}
    assert wanted <= set(NAMES)


def test_variances_are_those_of_the_authors_code():
    """Ho et al. sample with β in run_cifar.py, and with the posterior variance in run_lsun.py and run_celebahq.py."""
    names = ('cifar10', 'lsun_church', 'lsun_bedroom', 'ffhq')
    assert [resolved(name)['variance'] for name in names] == ['large', 'small', 'small', 'small']


@pytest.mark.parametrize('name', ['cifar10', 'celeba', 'imagenet64', 'digits', 'lsun_church'])
@pytest.mark.parametrize('eta', [0.0, 0.2, 0.5, 0.9])
def test_another_eta_alone_means_the_eta_family(name, eta):
    assert {key: resolved(name, eta=eta)[key] for key in ('eta', 'variance')} == {'eta': eta, 'variance': 'small'}


def resolved(name, **asked):
    """How a config samples, with these keys changed."""
    config = importlib.import_module(f'diffusion.configs.{name}').get_config()
    keys = ('num_steps', 'spacing', 'eta', 'variance', 'clip')
    how = {key: config.sample[key] for key in keys} | asked
    return compat.resolve(config.sample.compat, config.schedule.T, **how)
