"""How a training step scales with the number of devices: measured on simulated devices, modelled for real ones.

    python -m benchmarks.scaling

Measured: images per second and memory on 1, 2, 4 and 8 simulated devices, each in its own process. Simulated devices
share the cores of this machine, so images per second cannot rise with their number; they show the cost of splitting.
Then the temporary memory of a training step of the CIFAR-10 network, as XLA plans it for a CPU (`memory_analysis`),
with remat, bfloat16, accumulate and fsdp. That network is compiled but not run.

Modelled: `step_time`; docs/scaling.md has its assumptions. `--paper` prints only the table of the model.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

# FLOPs per image are those of the forward and backward pass. Activations are not sent between devices.
NETWORKS = {
    'CIFAR-10': dict(parameters=35_746_307, flops_per_image=36.5e9, batch=128),
    'LSUN 256': dict(parameters=113_673_219, flops_per_image=1.48e12, batch=64),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates of one device, as usually stated. Links send and receive at the same time, each at the full rate."""

    flops: float  # FLOP/s, bfloat16, dense
    memory: float  # bytes/s of its memory
    near: float  # bytes/s to devices of the same group
    group: int  # number of devices in a group
    far: float  # bytes/s of each device to other groups
    hop: float  # seconds of latency to a neighbour


DEVICES = {
    'TPU v4': Device(flops=275e12, memory=1.2e12, near=90e9, group=4096, far=6.25e9, hop=1e-6),
    'TPU v5e': Device(flops=197e12, memory=0.81e12, near=90e9, group=256, far=3.125e9, hop=1e-6),
    'H100, NVLink + 400 Gb/s each': Device(flops=989e12, memory=3.35e12, near=450e9, group=8, far=50e9, hop=5e-6),
}
UTILISATION = 0.35  # share of the peak rate that convolutions of this width reach with enough images per device
STATE_TRAFFIC = 4 * 9  # bytes per parameter: read the gradient; read and write parameter, EMA and two moments


def all_reduce_time(nbytes: float, devices: int, device: Device) -> float:
    """Return the seconds of an all-reduce of `nbytes` over all devices: reduce-scatter and all-gather in rings.

    Within a group of n devices, a ring moves 2·(n−1)/n·nbytes through each link in 2·(n−1) messages. Between groups,
    each device of a group reduces its own part, 1/n of the bytes. A large group is a torus, whose rings run along each
    axis: 2·2·(√n−1) hops.
    """
    near = min(devices, device.group)
    far = math.ceil(devices / near)
    hops = 2 * (near - 1) if near <= 8 else 4 * (math.sqrt(near) - 1)
    within = 2 * (near - 1) / near * nbytes / device.near + hops * device.hop
    between = 2 * (far - 1) / far * nbytes / near / device.far + 2 * (far - 1) * device.hop
    return within + between


def step_time(network: dict, device: Device, devices: int, batch: int) -> dict[str, float]:
    """Return the seconds of a training step with replicated parameters.

    Returns:
        {'compute', 'update', 'reduce', 'step', 'hidden'}: 'step' reduces the gradients after the backward pass,
        'hidden' overlaps the reduction with it.
    """
    compute = batch / devices * network['flops_per_image'] / (UTILISATION * device.flops)
    update = STATE_TRAFFIC * network['parameters'] / device.memory
    reduce = all_reduce_time(4 * network['parameters'], devices, device)
    backward = 2 / 3 * compute
    return {
        'compute': compute,
        'update': update,
        'reduce': reduce,
        'step': compute + update + reduce,
        'hidden': compute + update + max(0, reduce - backward),
    }


def paper() -> list[dict]:
    """Return the rows (network, device, devices, batch, milliseconds …) of the table in docs/scaling.md."""
    rows = []
    for name, network in NETWORKS.items():
        for kind, device in DEVICES.items():
            for devices in (8, 64, 256, 1024):
                for images in (network['batch'] // 8, 1):  # per device: the paper's batch on eight devices; the minimum
                    times = step_time(network, device, devices, images * devices)
                    alone = step_time(network, device, 1, images)['step']
                    rows.append(
                        {'network': name, 'device': kind, 'devices': devices, 'batch': images * devices}
                        | {f'{key} ms': 1e3 * value for key, value in times.items()}
                        | {
                            'images/s': images * devices / times['step'],
                            'efficiency': alone / times['step'],
                            'efficiency, hidden': alone / times['hidden'],
                        }
                    )
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table, as docs/scaling.md shows it."""
    lines = [
        '| network | devices | number | batch | compute ms | update ms | reduce ms | step ms | images/s | efficiency |',
        '|---|---|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for row in rows:
        times = ' | '.join(f'{row[f"{key} ms"]:.3g}' for key in ('compute', 'update', 'reduce', 'step'))
        lines.append(
            f'| {row["network"]} | {row["device"]} | {row["devices"]:,} | {row["batch"]:,} | {times} | '
            f'{row["images/s"]:,.0f} | {row["efficiency"]:.0%} … {row["efficiency, hidden"]:.0%} |'
        )
    return '\n'.join(lines) + '\n'


def markdown_of_memory(result: dict) -> str:
    """Return the measured memory as a table, as docs/cluster.md shows it."""
    lines = ['| CIFAR-10 on a device | state, MB | temporary, MB |', '|---|---:|---:|']
    for name, found in result['CIFAR-10, bytes on a device'].items():
        lines.append(f'| {name} | {found["state"] / 1e6:,.0f} | {found["temporary"] / 1e6:,.0f} |')
    return '\n'.join(lines) + '\n'


def markdown_of_rates(result: dict) -> str:
    """Return the measured rates as a table, as docs/scaling.md shows it."""
    lines = ['| mesh | images/s | state, MB | temporary, MB |', '|---|---:|---:|---:|']
    for name, found in result['digits, batch of 64'].items():
        rate = found['images a second, median of three']
        lines.append(f'| {name} | {rate:,.0f} | {found["state"] / 1e6:.1f} | {found["temporary"] / 1e6:.1f} |')
    return '\n'.join(lines) + '\n'


# The following functions run in their own processes, where XLA_FLAGS sets the number of devices.


def compiled_step(config: ConfigDict) -> tuple[Any, Callable, dict[str, int]]:
    """Compile a training step from shapes alone.

    Returns:
        (the Experiment, the compiled step, {'state', 'temporary'}: bytes per device).
    """
    import jax
    import numpy as np

    from diffusion import build
    from diffusion.modes import train
    from diffusion.runtime import mesh as meshes

    exp = build.build(config)
    state = exp.abstract_state()
    split = meshes.split_batch(exp.mesh)
    size, channels = config.data.image_size, config.data.channels
    images = jax.ShapeDtypeStruct((config.train.batch_size, size, size, channels), np.uint8, sharding=split)
    step = train.compile_step(config, exp, state, images, None)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    return exp, step, {'state': held, 'temporary': step.compiled.memory_analysis().temp_size_in_bytes}


def measure_rate(devices: int, fsdp: int, steps: int = 20) -> dict:
    """Return images per second with the digits' network, and bytes per device."""
    import jax
    import numpy as np

    from diffusion.configs import digits
    from diffusion.runtime import mesh as meshes

    assert jax.device_count() == devices
    config = digits.get_config()
    config.mesh.fsdp, config.train.batch_size = fsdp, 64
    exp, step, found = compiled_step(config)
    state = exp.packed(exp.initial_state(jax.random.key(0)))
    batch = meshes.put(np.zeros((64, 8, 8, 1), np.uint8), meshes.split_batch(exp.mesh))
    state, _ = jax.block_until_ready(step(state, batch, None))
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(steps):
            state, _ = step(state, batch, None)
        jax.block_until_ready(state)
        rates.append(64 * steps / (time.perf_counter() - started))
    return found | {'images a second, median of three': float(np.median(rates)), 'all': rates}


def measure_memory(fsdp: int, batch: int, **changes: Any) -> dict[str, int]:
    """Return the bytes per device of a training step of the CIFAR-10 network."""
    from diffusion.configs import cifar10

    config = cifar10.get_config()
    config.mesh.fsdp, config.train.batch_size = fsdp, batch
    config.update_from_flattened_dict(changes)
    return compiled_step(config)[2]


def in_a_process(devices: int, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the result of a function of this module, called in a new process with simulated devices."""
    program = (
        'import json, sys; from benchmarks import scaling; '
        'name, args, kwargs = json.loads(sys.argv[1]); '
        'print(json.dumps(getattr(scaling, name)(*args, **kwargs)))'
    )
    quick = '' if function is measure_rate else ' --xla_backend_optimization_level=0'  # compiled only, not run
    done = subprocess.run(
        [sys.executable, '-c', program, json.dumps([function.__name__, args, kwargs])],
        env=os.environ
        | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}{quick}', 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


BATCH = 16  # images per device
SAVINGS = {
    'as it is': {},
    'accumulate=4': {'train.accumulate': 4},
    'dtype=bfloat16': {'model.dtype': 'bfloat16'},
    'remat': {'model.remat': True},
    'remat, bfloat16': {'model.remat': True, 'model.dtype': 'bfloat16'},
}


def main() -> None:
    """Measure, and store the figures; or print the table of the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--paper', action='store_true', help='print the table of the model, measure nothing')
    if parser.parse_args().paper:
        print(markdown(paper()), end='')
        return
    from benchmarks.record import store

    result = {
        'note': 'simulated devices share the cores, so images per second cannot rise with their number',
        'digits, batch of 64': {},
        'CIFAR-10, bytes on a device': {},
    }

    def keep(part, name, found):
        result[part][name] = found
        print(name, found, flush=True)

    for name, changes in SAVINGS.items():
        found = in_a_process(1, measure_memory, 1, BATCH, **changes)
        keep('CIFAR-10, bytes on a device', f'1 device, batch of {BATCH}, {name}', found)
    name = f'8 devices, batch of {8 * BATCH}, fsdp=8'
    keep('CIFAR-10, bytes on a device', name, in_a_process(8, measure_memory, 8, 8 * BATCH))
    for devices, fsdp in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 8)):
        name = f'data {devices // fsdp} × fsdp {fsdp}'
        keep('digits, batch of 64', name, in_a_process(devices, measure_rate, devices, fsdp))
    store('scaling', result)


if __name__ == '__main__':
    main()
