"""The mesh of eight simulated devices, and the placement of arrays on it."""

import json

from tests.runtime.common import python

PROGRAM = """
import json
import jax, numpy as np
from diffusion.runtime import mesh as meshes

SHAPES = [(), (1020,), (1024,), (3, 3, 8, 16), (3, 3, 16, 8), (3, 3, 6, 22), (12, 86), (6, 172), (1, 520, 2)]
seen = {'errors': [], 'shards': {}}
for fsdp in (0, 3, 16):
    try:
        meshes.make_mesh(fsdp)
    except ValueError as error:
        seen['errors'].append(str(error))
for fsdp in (1, 4, 8):
    mesh = meshes.make_mesh(fsdp)
    assert dict(mesh.shape) == {'data': 8 // fsdp, 'fsdp': fsdp}
    tree = [jax.ShapeDtypeStruct(shape, 'float32') for shape in SHAPES]
    shardings = meshes.split_state(mesh, tree)
    seen['shards'][fsdp] = [s.shard_shape(t.shape) for s, t in zip(shardings, tree, strict=True)]
    batch = jax.device_put(np.arange(16), meshes.split_batch(mesh))
    parts = [tuple(np.asarray(shard.data)) for shard in batch.addressable_shards]
    assert sorted(parts) == [(i, i + 1) for i in range(0, 16, 2)], parts
    whole = jax.device_put(np.arange(16), meshes.replicated(mesh))
    assert all(shard.data.shape == (16,) for shard in whole.addressable_shards)
mesh = meshes.make_mesh(4)
kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype('float32')
split = jax.device_put(kernel, meshes.split_state(mesh, kernel))
assert (np.asarray(split) == kernel).all()
print(json.dumps(seen))
"""


def test_arrays_are_split_over_eight_devices():
    done = python(PROGRAM, XLA_FLAGS='--xla_force_host_platform_device_count=8', JAX_PLATFORMS='cpu')
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen['errors']) == 3
    for fsdp, error in zip((0, 3, 16), seen['errors'], strict=True):
        assert f'fsdp is {fsdp}' in error and '8 devices' in error
    small = [[], [1020]]  # replicated, although 4 divides 1020
    shapes = [[1024], [3, 3, 8, 16], [3, 3, 16, 8], [3, 3, 6, 22], [12, 86], [6, 172], [1, 520, 2]]
    assert seen['shards']['1'] == small + shapes
    # The largest axis that 4 (8) divides is split; (3, 3, 6, 22) has none.
    by_4 = [[256], [3, 3, 8, 4], [3, 3, 4, 8], [3, 3, 6, 22], [3, 86], [6, 43], [1, 130, 2]]
    by_8 = [[128], [3, 3, 8, 2], [3, 3, 2, 8], [3, 3, 6, 22], [12, 86], [6, 172], [1, 65, 2]]
    assert seen['shards']['4'] == small + by_4
    assert seen['shards']['8'] == small + by_8
