"""Devices and hosts: one mesh with the axes ('data', 'fsdp'). One device is the 1×1 mesh."""

import hashlib
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.runtime.xla import fold

MOST_CORES = 8  # that become devices: each of them holds the parameters


def use_cores(most):
    """Make each core of a lone host a CPU device, up to `most` of them; before anything touches a device.

    Several devices share a batch, and keep more cores busy than a program that is computed by all: many of its products
    and sums are too small to be split. Where JAX was told how many there are, by JAX_NUM_CPU_DEVICES or XLA_FLAGS,
    there are that many.
    """
    told = jax.config.jax_num_cpu_devices >= 0
    told |= 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
    if not told and not jax.distributed.is_initialized():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        jax.config.update('jax_num_cpu_devices', max(min(cores, most, MOST_CORES), 1))


def make_mesh(fsdp=1):
    """All devices as (devices/fsdp, fsdp). Raises ValueError where fsdp does not divide their number."""
    devices = np.asarray(in_order(jax.devices()))
    if fsdp < 1 or devices.size % fsdp:
        raise ValueError(f'fsdp is {fsdp}, which does not divide the {devices.size} devices')
    return Mesh(devices.reshape(-1, fsdp), ('data', 'fsdp'))


def in_order(devices):
    """Devices by host, and by number within each.

    Each host feeds its part of a batch as one piece, and the pieces follow in the order of the hosts: were the devices
    of a host scattered, as those of a TPU slice can be, the batch would be another one, and fsdp would cross hosts.
    """
    return sorted(devices, key=lambda device: (device.process_index, device.id))


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


def put_whole(array, sharding):
    """An array that every host has, on the devices."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather(array):
    """The whole of an array that may be split over devices and hosts, on every host."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def whole(mesh, tree):
    """Within a compiled program: every device is given the whole of what is split, as FSDP does with parameters.

    Left to itself, XLA would split some products by their columns instead, and send activations around.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def mean_over_parts(mesh, fun, params, key, batch, count):
    """Within a compiled program: the mean of fun(params, key, *part) over the parts of a batch, one after another.

    Each device cuts its share of the batch into `count` parts and adds up what it finds; then, once, they are averaged
    over the devices.

    fun: its result is a tree of floats, a mean over its part; params: a tree, whole; key: from which each part gets a
    key of its own; batch: arrays (B, ...), B a multiple of the devices times count.
    """
    axes = mesh.axis_names

    def of_device(params, key, *share):
        keys = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(axes)), count)
        parts = [keys, *(x.reshape(count, -1, *x.shape[1:]) for x in share)]
        found = jax.eval_shape(fun, params, *(x[0] for x in parts))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
        total = fold(lambda total, part: jax.tree.map(jnp.add, total, fun(params, *part)), zero, parts)
        return jax.lax.pmean(jax.tree.map(lambda leaf: leaf / count, total), axes)

    specs = PartitionSpec(), PartitionSpec(), *len(batch) * [PartitionSpec(axes)]
    # without check_vma each device has gradients of its own; with it JAX would reduce them after each part
    parted = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return parted(params, key, *batch)


def like_state(mesh, tree):
    """Within a compiled program: each device goes on with its part only, as `split_state` has it."""
    return jax.lax.with_sharding_constraint(tree, split_state(mesh, tree))


class Agreement:
    """What any host says, all hosts know one step later; no host waits for it."""

    def __init__(self, mesh):
        self._sharding = split_batch(mesh)
        self._count = len(mesh.local_devices)
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))
        self._alone = jax.process_count() == 1
        self._asked = None

    def __call__(self, flag):
        """Say `flag`; returns whether any host said so at the last call."""
        if self._alone:
            return bool(flag)
        before, self._asked = self._asked, self._any(put(np.full(self._count, bool(flag)), self._sharding))
        return before is not None and bool(before)


def is_first():
    """Whether this is the host that writes logs and pictures."""
    return jax.process_index() == 0


def any_host(flag):
    """Whether any host says so; they wait for each other."""
    return bool(sum_over_hosts(np.array([bool(flag)], np.uint32))[0])


def sum_over_hosts(array):
    """Σ over hosts of an array that each of them has; they wait for each other."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.process_allgather(array)).sum(0, dtype=array.dtype)


def from_first(array):
    """What the first host has, on all hosts; also, all hosts wait for each other."""
    return array if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(array)


def differences(values):
    """{name: what two hosts have} of each value that is not the same on all hosts, which wait for each other.

    values: {name: text}. All hosts are given the same answer.
    """
    if jax.process_count() == 1:
        return {}
    text = json.dumps(values, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint32)
    heads = multihost_utils.process_allgather(np.append(digest, np.uint32(len(text))))
    if (heads == heads[0]).all():
        return {}
    padded = text.ljust(heads[:, -1].max())  # JSON minds no spaces
    hosts = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))]
    found = {}
    for name in sorted(set().union(*hosts)):
        on = [host.get(name, 'nothing') for host in hosts]
        other = next((i for i, value in enumerate(on) if value != on[0]), None)
        if other:
            found[name] = f'process 0 has {on[0]}, process {other} has {on[other]}'
    return found


# Dense matrix products a second in bfloat16, as the makers state them.
PEAK_FLOPS = {
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,  # SXM
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H200': 989e12,
    'TPU v3': 123e12 / 2,  # a device is a core, half a chip
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
}


def peak_flops(device):
    """The most operations a second of a device, or None where it is not known."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def fits(mesh, nbytes, share=0.25):
    """Whether an array of so many bytes takes at most that share of the memory of each device.

    Devices that do not tell their memory, as CPUs, are taken to have 8 GB.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return nbytes <= share * min(s.get('bytes_limit', 8e9) for s in stats)


# Biases and scales of norms stay whole: each would be gathered and reduced in messages of its own, which cost more
# than what is in them, and all together they are less than a hundredth of a network that is worth splitting.
FEWEST_TO_SPLIT = 1024


def split_state(mesh, tree):
    """A sharding for each array of a state: its largest axis that fsdp divides is split over 'fsdp'.

    Arrays of fewer than FEWEST_TO_SPLIT values are whole on each device.
    tree: arrays or ShapeDtypeStructs. Returns a tree of the same structure.
    """
    fsdp = mesh.shape['fsdp']

    def rule(leaf):
        axes = [axis for axis in range(len(leaf.shape)) if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or not axes or math.prod(leaf.shape) < FEWEST_TO_SPLIT:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

    return jax.tree.map(rule, tree)
