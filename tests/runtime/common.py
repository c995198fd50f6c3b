"""Helpers that several tests of the runtime share."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


def python(program, *args, **environment):
    """Run a program in a process of its own, in which the project can be imported."""
    return subprocess.run(
        [sys.executable, '-c', program, *map(str, args)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def describe(tree):
    """Return the ShapeDtypeStructs, with shardings, of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def assert_same(actual, expected):
    """Assert that two trees have the same structure and their arrays the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
