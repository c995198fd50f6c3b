"""Tiny runs, and the files that they leave."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffusion import build, workdir
from diffusion.build import Skipped
from diffusion.configs import digits
from tests import two_layers

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = '--config=configs/digits.py'
QUICK = '--config=tests/two_layers.py'
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
    'compile_cache': 'off',  # leaves JAX's cache of the test session, see conftest.py
}


def tiny(changes=None):
    """The config of a small U-Net and a chain of four levels."""
    config = digits.get_config()
    config.update_from_flattened_dict(TINY | (changes or {}))
    return config


def quick(changes=None):
    """The same with a network of two layers, for what is not about the network."""
    config = two_layers.get_config()
    config.update_from_flattened_dict(TINY | (changes or {}))
    return config


def dotted(changes):
    """{key of a config: value} of keyword arguments, in whose names __ stands for the dot."""
    return {key.replace('__', '.'): value for key, value in changes.items()}


def flags(path, config=CONFIG, **changes):
    """The command line of a tiny run in `path`; in the names of changes, __ stands for the dot."""
    settings = TINY | dotted(changes)
    return [config, f'--workdir={path}', *(f'--config.{key}={value}' for key, value in settings.items())]


def main(*arguments, **environment):
    """Run main.py to its end."""
    return subprocess.run(
        [sys.executable, 'main.py', *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_refused(done, *words):
    """The process failed with an error that contains these words, and without a traceback."""
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 75), output
    assert 'Traceback' not in output, output
    for word in words:
        assert word in output, output


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def saved(path):
    """The steps of the complete checkpoints."""
    return sorted(int(folder.name) for folder in (path / 'checkpoints').iterdir() if folder.name.isdigit())


def checkpoint(path, step):
    """{part and path of an array: the array}, read by Orbax alone."""
    arrays = {}
    parts = [path / 'checkpoints' / str(step) / part for part in ('params', 'ema', 'opt_state', 'skipped', 'history')]
    for folder in parts[:-1] if not parts[-1].exists() else parts:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder)
        for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[folder.name + jax.tree_util.keystr(place)] = np.asarray(leaf)
    return arrays


def assert_bitwise(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or one[name].shape != other[name].shape] == []
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def metrics(path, last=None):
    """(step, loss, grad_norm, learning_rate) of each complete line of metrics.jsonl."""
    text = (path / 'logs' / 'metrics.jsonl').read_text(encoding='utf-8')
    logged = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]
    assert all(line['images_per_second'] > 0 for line in logged)
    names = ('step', 'loss', 'grad_norm', 'learning_rate')
    return [tuple(line[name] for name in names) for line in logged][:last]


def random_params(config, seed):
    """Parameters so large that the network's output matters; a fresh network outputs 0."""
    rng = np.random.default_rng(seed)
    abstract = build.build(config).abstract_state().params
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)


def make_run(path, config, step, *, params, ema):
    """A workdir whose checkpoint holds these weights, as training would leave it."""
    stored = workdir.write_config(config, str(path))
    with workdir.open_checkpoints(config, str(path)) as checkpoints:
        zero = np.zeros((), np.int32)
        checkpoints.save(step, stored, params=params, ema=ema, skipped=Skipped(zero, zero))
    return path
