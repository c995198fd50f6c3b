"""Equal seeds share no draw: every mode takes its random keys from a domain of its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import sampler
from diffusion.modes import data, likelihood, sample, train
from diffusion.networks import NETWORKS
from diffusion.runtime.keys import DOMAINS, domain_key
from tests.runs import quick
from tests.two_layers import TwoLayers

CHANGES = {
    'model.network': 'two layers',
    'model.dropout': 0.1,
    'data.flip': True,
    'data.labels': True,
    'train.label_dropout': 0.1,
    'train.num_steps': 6,
    'sample.num_images': 6,
    'sample.num_steps': 2,
    'likelihood.num_images': 6,
    'likelihood.batch_size': 1,
    'likelihood.samples': 2,
    'likelihood.quantities': ('posterior', 'importance'),
}
MODES = (train, sample, likelihood, data)


def record_keys(monkeypatch):
    """Record the keys that the modes use, as {what for: set of key data}, from inside compiled functions as well."""
    keys = {}

    def record(name, key):
        def add(rows):
            keys.setdefault(name, []).extend(map(tuple, np.asarray(rows).reshape(-1, 2).tolist()))

        jax.debug.callback(add, jax.random.key_data(key))

    def wrap(module, name, label, position=0):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            record(label, args[position])
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    class Recording(TwoLayers):
        def __init__(self, *, image_channels, channels, dropout, dtype, rngs, num_classes):
            record('init', rngs.default.key[...])
            layers = dict(image_channels=image_channels, channels=channels, dropout=dropout, dtype=dtype, rngs=rngs)
            super().__init__(**layers, num_classes=num_classes)

        def __call__(self, x, t, labels=None, *, deterministic=True, rngs=None):
            if not deterministic:
                record('dropout', rngs.dropout.key[...])
            return super().__call__(x, t, labels, deterministic=deterministic, rngs=rngs)

    monkeypatch.setitem(NETWORKS, 'two layers', Recording)
    wrap(train, 'draw', 'noise')
    wrap(train, 'augment', 'flips')
    wrap(train, 'drop_labels', 'labels')
    wrap(sampler, 'sample', 'sampling')
    wrap(likelihood, 'elbo', 'likelihood')
    wrap(likelihood, 'log_weight', 'likelihood')
    return keys


def record_domains(monkeypatch):
    """Record (mode, domain) of each call of `domain_key`."""
    asked = set()

    def wrap(mode):
        def wrapper(seed, domain):
            asked.add((mode.__name__.rpartition('.')[2], domain))
            return domain_key(seed, domain)

        monkeypatch.setattr(mode, 'domain_key', wrapper)

    for mode in MODES:
        wrap(mode)
    return asked


def test_equal_seeds_of_all_modes_share_no_key(tmp_path, monkeypatch):
    """Neither the keys that are used, nor those that are split from them or folded with a step or an index."""
    keys, asked = record_keys(monkeypatch), record_domains(monkeypatch)
    for mode in MODES:
        assert mode.run(quick(CHANGES), str(tmp_path)) == 0
    jax.effects_barrier()
    assert asked == {
        ('train', 'init'),
        ('train', 'noise'),
        ('train', 'dropout'),
        ('train', 'flips'),
        ('train', 'labels'),
        ('sample', 'sampling'),
        ('likelihood', 'likelihood'),
        ('data', 'flips'),
    }
    assert {domain for _, domain in asked} == set(DOMAINS)

    counts = {name: len(set(found)) for name, found in keys.items()}
    # 6 steps; 6 images; for each of 6 images one key of the ELBO and 2 of the importance-weighted bound.
    expected = {'noise': 6, 'flips': 6, 'labels': 6, 'dropout': 6, 'sampling': 6, 'likelihood': 18}
    assert {name: counts[name] for name in expected} == expected and set(counts) == {*expected, 'init'}

    def derived(key):
        key = jax.random.wrap_key_data(jnp.array(key, jnp.uint32), impl='threefry2x32')
        children = [*jax.random.split(key, 2), *(jax.random.fold_in(key, i) for i in range(8))]
        return {tuple(np.asarray(jax.random.key_data(child)).tolist()) for child in children}

    family = {name: set(found).union(*map(derived, set(found))) for name, found in keys.items()}
    family['seed'] = {tuple(np.asarray(jax.random.key_data(jax.random.key(0))).tolist())}
    for one, other in itertools.combinations(family, 2):
        assert not family[one] & family[other], (one, other)
