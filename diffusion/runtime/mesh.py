"""Devices: one mesh with the axes ('data', 'fsdp'). One device is the 1×1 mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(fsdp=1):
    """All devices as (devices/fsdp, fsdp). Raises ValueError where fsdp does not divide their number."""
    devices = np.asarray(jax.devices())
    if fsdp < 1 or devices.size % fsdp:
        raise ValueError(f'fsdp is {fsdp}, which does not divide the {devices.size} devices')
    return Mesh(devices.reshape(-1, fsdp), ('data', 'fsdp'))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
    """Each device holds its part of axis 0, over both axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def put(array, sharding):
    """An array on the devices: the whole of it where it is replicated, else this host's part of axis 0."""
    shape = np.shape(array) if sharding.is_fully_replicated else None
    return jax.make_array_from_process_local_data(sharding, np.asarray(array), shape)


def fits(mesh, nbytes, share=0.25):
    """Whether an array of so many bytes takes at most that share of the memory of each device.

    Devices that do not tell their memory, as CPUs, are taken to have 8 GB.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return nbytes <= share * min(s.get('bytes_limit', 8e9) for s in stats)


def split_state(mesh, tree):
    """A sharding for each array of a state: its largest axis that fsdp divides is split over 'fsdp'.

    tree: arrays or ShapeDtypeStructs. Returns a tree of the same structure.
    """
    fsdp = mesh.shape['fsdp']

    def rule(leaf):
        axes = [axis for axis in range(len(leaf.shape)) if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

    return jax.tree.map(rule, tree)
