"""Memory: how much there is, how much a program takes, and the messages when it runs out."""

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from typing import Any

import jax

from diffusion.util import RunError

UNITS = {'TB': 1e12, 'GB': 1e9, 'MB': 1e6, 'kB': 1e3}
CGROUPS, OWN_CGROUPS = '/sys/fs/cgroup', '/proc/self/cgroup'  # where Linux has the limits of containers and jobs
# What XLA could not allocate: '3000000000 bytes', or '2.62GiB', or '4.39G' on TPUs, where G is 2³⁰.
ASKED = re.compile(r'allocat(?:e|ing) (?:request for )?(\d+(?:\.\d+)?) ?([KMGT]?)')


def of_host() -> int | None:
    """Return the bytes of memory that this process may use: of the machine, its container and its limits."""
    found = []
    with contextlib.suppress(OSError, ValueError):  # not every system tells
        found.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    for path in _cgroup_limits():
        try:
            with open(path, encoding='ascii') as file:
                found.append(int(file.read()))
        except (OSError, ValueError):  # there is no such limit, or it is 'max'
            continue
    found += [soft for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA) if (soft := resource.getrlimit(kind)[0]) > 0]
    return min(found, default=None)


def _cgroup_limits() -> Iterator[str]:
    """Files with the limits of the container or the job that the process is in, and of those around it."""
    groups = []
    with contextlib.suppress(OSError), open(OWN_CGROUPS, encoding='utf-8') as file:
        groups = [line.rstrip('\n').split(':', 2) for line in file]  # number, controllers, path
    paths = {controller: path for _, controllers, path in groups for controller in controllers.split(',')}
    # Version 2 has one tree for all controllers, and no names of controllers; version 1 has a tree for each.
    for controller, limit in (('', 'memory.max'), ('memory', 'memory.limit_in_bytes')):
        path = paths.get(controller, '')
        while path.strip('/'):
            yield os.path.join(CGROUPS, controller, path.lstrip('/'), limit)
            path = os.path.dirname(path)
        yield os.path.join(CGROUPS, controller, limit)


def of_device(device: Any) -> int | None:
    """Return the bytes of memory of a device of this host; CPU devices share the host's."""
    if device.platform == 'cpu':
        total = of_host()
        return total // len(jax.local_devices()) if total else None
    return (device.memory_stats() or {}).get('bytes_limit')


def of_program(program: jax.stages.Compiled) -> int | None:
    """Return XLA's estimate of the bytes that a compiled program takes on each device, with arguments and results."""
    plan = program.memory_analysis()
    if plan is None:
        return None
    arrays = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return arrays + plan.temp_size_in_bytes


def peak() -> int | None:
    """Return the most bytes that any device of this host has held at once, or None if they do not say."""
    found = [(device.memory_stats() or {}).get('peak_bytes_in_use', 0) for device in jax.local_devices()]
    return max(found) or None


def require(nbytes: int | None, what: str, advice: str) -> None:
    """Raise RunError if something takes more memory than a device has.

    Args:
        nbytes: bytes on each device; None if they are not known.
        what: the name of what takes the memory, for the message.
        advice: what the user can do, for the message.
    """
    device = jax.local_devices()[0]
    there = of_device(device)
    if nbytes and there and nbytes > there:
        raise RunError(
            f'{what} takes {size(nbytes)} on each device, but {device.device_kind} has {size(there)}: {advice}'
        )


def size(nbytes: int) -> str:
    """Format a number of bytes with a unit."""
    unit = next((unit for unit in UNITS if nbytes >= UNITS[unit]), 'kB')
    return f'{nbytes / UNITS[unit]:,.1f} {unit}'


def exhausted(error: BaseException) -> str | None:
    """Return a message, with the size of the request, if an exception means that memory ran out; else None."""
    if isinstance(error, MemoryError):
        return f'out of memory on the host: {error}' if str(error) else 'out of memory on the host'
    # JAX raises XLA's error as a ValueError if there is no room on a TPU for an array that is put there.
    of_xla = isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)
    if not of_xla and not (isinstance(error, ValueError) and str(error).startswith('RESOURCE_EXHAUSTED: ')):
        return None
    asked = ASKED.search(str(error))
    nbytes = int(float(asked[1]) * 2 ** (10 * ' KMGT'.index(asked[2] or ' '))) if asked else 0
    there = of_device(jax.local_devices()[0])
    return (
        'out of device memory'
        + (f': {size(nbytes)} could not be allocated' if nbytes else '')
        + (f'; the device has {size(there)}' if there else '')
    )
