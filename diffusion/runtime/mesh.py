"""Devices: one mesh with the axes ('data', 'fsdp'), and how arrays are placed on it. One device is the 1×1 mesh."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

MAX_CORES = 8  # CPU devices at most: each holds a copy of the parameters

# Smaller arrays, such as biases and the scales of norms, are replicated: each would need messages of its own to be
# gathered and reduced, and together they are less than a hundredth of a network that is worth splitting.
MIN_SIZE_TO_SPLIT = 1024

# Floating-point operations per second in dense bfloat16 matrix products, by the name of the device: cards of one
# generation differ. NVIDIA's data sheets, which runtime/targets.py names, state twice as much, with sparsity, from the
# H100 on; Google's pages state it by chip.
PEAK_FLOPS = {
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA A100-PCIE-40GB': 312e12,
    'NVIDIA A100 80GB PCIe': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,  # SXM
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835.5e12,
    'NVIDIA H200': 989e12,  # SXM
    'NVIDIA B200': 2250e12,
    'TPU v2': 46e12 / 2,  # a device is a core, half a chip
    'TPU v3': 123e12 / 2,  # half a chip
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,  # v5e
    'TPU v5': 459e12,  # v5p
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,  # v6e
    'TPU7x': 2307e12 / 2,  # half a chip
}


def use_cores(most: int) -> None:
    """Make each core of a single host a CPU device. Call it before anything uses a device.

    A batch that is split over several devices keeps the cores busier than one program that runs on all of them,
    because many of its operations are too small to be split. The number of devices is a setting of the whole process:
    JAX reads it once, when it starts its backend. If JAX_NUM_CPU_DEVICES or XLA_FLAGS already set it, nothing changes.

    Args:
        most: the largest number of devices; there is always at least one.
    """
    is_set = jax.config.jax_num_cpu_devices >= 0  # type: ignore[attr-defined]
    is_set |= 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
    if not is_set and not jax.distributed.is_initialized():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        jax.config.update('jax_num_cpu_devices', max(min(cores, most, MAX_CORES), 1))


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of all devices, of shape (devices / fsdp, fsdp).

    Args:
        fsdp: over how many devices the state is split.
        devices: other devices than those of this run.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    found = np.asarray(by_host(jax.devices() if devices is None else devices))
    if fsdp < 1 or found.size % fsdp:
        raise ValueError(f'fsdp is {fsdp}, which does not divide the {found.size} devices')
    return Mesh(found.reshape(-1, fsdp), ('data', 'fsdp'))


def by_host(devices: Iterable[Any]) -> list[Any]:
    """Return devices sorted by host, and by id within a host.

    Each host feeds its part of a batch as one block, in the order of the hosts. On a TPU slice the ids of a host's
    devices may be scattered: sorted by id alone, they would change the order of the batch, and `fsdp` would cross
    hosts.
    """
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits axis 0 over both axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def split_state(mesh: Mesh, tree: Any) -> Any:
    """Return a sharding for each array of a state: its largest axis that fsdp divides is split over 'fsdp'.

    Arrays of fewer than MIN_SIZE_TO_SPLIT elements are replicated, and so are those without such an axis.

    Args:
        mesh: see `make_mesh`.
        tree: arrays or ShapeDtypeStructs.

    Returns:
        A tree of the same structure.
    """
    fsdp = mesh.shape['fsdp']

    def rule(leaf: Any) -> NamedSharding:
        axes = [axis for axis in range(len(leaf.shape)) if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or not axes or math.prod(leaf.shape) < MIN_SIZE_TO_SPLIT:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

    return jax.tree.map(rule, tree)


def put(array: Any, sharding: Sharding) -> jax.Array:
    """Put an array on the devices, from the part that this host holds.

    Args:
        array: the whole array if the sharding replicates it, else this host's part of axis 0.
        sharding: of the whole array.

    Returns:
        The whole array.
    """
    shape = np.shape(array) if sharding.is_fully_replicated else None
    return jax.make_array_from_process_local_data(sharding, np.asarray(array), shape)


def put_whole(array: Any, sharding: Sharding) -> jax.Array:
    """Put an array on the devices, if every host holds the whole array.

    Args:
        array: the whole array, the same on every host.
        sharding: of the result.

    Returns:
        The array. Each device holds its part of it.
    """
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(tree: Any) -> Any:
    """Return the arrays of a tree in the host's memory.

    Raises:
        jax.errors.JaxRuntimeError: their computation failed. Without the wait, reading such an array may hang or abort.
    """
    return jax.device_get(jax.block_until_ready(tree))


def gather(array: Any) -> np.ndarray:
    """Return the whole array, which may be split over devices and hosts. All hosts must call it."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def whole(mesh: Mesh, tree: Any) -> Any:
    """Inside a compiled function: gather the arrays of a tree on every device, as FSDP does with parameters.

    Without it, XLA splits some matrix products by columns and sends activations between devices instead.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def like_state(mesh: Mesh, tree: Any) -> Any:
    """Inside a compiled function: keep on each device its part of a tree, as `split_state` divides it."""
    return jax.lax.with_sharding_constraint(tree, split_state(mesh, tree))


def mean_over_parts(
    mesh: Mesh,
    fun: Callable[..., Any],
    params: Any,
    key: jax.Array,
    batch: Sequence[jax.Array],
    count: int,
    *,
    fold: Callable[[Callable[[Any, Any], Any], Any, Sequence[jax.Array]], Any],
) -> Any:
    """Inside a compiled function: the mean of fun(params, key, *part) over the parts of a batch, one after another.

    Each device cuts its share of the batch into `count` parts and sums over them. At the end, the sums are averaged
    over the devices, once.

    Args:
        mesh: see `make_mesh`.
        fun: (params, key, *part) -> a tree of floats, each a mean over the part.
        params: a tree of replicated arrays.
        key: typed PRNG key, from which a key for each part is derived.
        batch: arrays (B, ...), where B is a multiple of the number of devices times `count`.
        count: the number of parts of each device's share.
        fold: fold(body, carry, parts) is the loop carry = body(carry, part), see `networks.plain.fold`.

    Returns:
        A tree like that of `fun`, replicated.
    """
    axes = mesh.axis_names

    def of_device(params: Any, key: jax.Array, *share: jax.Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(axes)), count)
        parts = [keys, *(x.reshape(count, -1, *x.shape[1:]) for x in share)]
        result = jax.eval_shape(fun, params, *(x[0] for x in parts))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), result)
        total = fold(lambda total, part: jax.tree.map(jnp.add, total, fun(params, *part)), zero, parts)
        return jax.lax.pmean(jax.tree.map(lambda leaf: leaf / count, total), axes)

    specs = PartitionSpec(), PartitionSpec(), *len(batch) * [PartitionSpec(axes)]
    # With check_vma, JAX would reduce gradients over the devices after each part instead of once.
    over_devices = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return over_devices(params, key, *batch)


def fits(mesh: Mesh, nbytes: int, share: float = 0.25) -> bool:
    """Return whether an array takes at most a given share of the memory of every device.

    Args:
        mesh: its devices on this host are checked.
        nbytes: the size of the array in bytes.
        share: of a device's memory. A device that does not report its memory, such as a CPU, counts as 8 GB.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return nbytes <= share * min(s.get('bytes_limit', 8e9) for s in stats)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak rate of a kind of device in bfloat16 operations per second, or None if it is not known."""
    return PEAK_FLOPS.get(device_kind)
