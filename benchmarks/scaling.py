"""How a training step spreads over devices: measured on simulated ones, and on paper for real ones.

    python -m benchmarks.scaling

Measured: images a second and bytes on 1, 2, 4, 8 simulated devices, each in a process of its own. Simulated devices
share the cores of this machine, so that the images a second cannot rise with their number: what they tell is
what splitting costs. Then the bytes that a step of the CIFAR-10 network needs beside its state, as XLA plans them
for a CPU (`memory_analysis`), with remat, bfloat16, accumulate and fsdp. Nothing of that network is run.

On paper: `step_time`, whose assumptions are in docs/scaling.md. `--paper` prints that table alone.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time

# Of a step. FLOPs of an image: of the forward and the backward pass; activations are not sent anywhere.
NETWORKS = {
    'CIFAR-10': dict(parameters=35_746_307, flops_an_image=36.5e9, batch=128),
    'LSUN 256': dict(parameters=113_673_219, flops_an_image=1.48e12, batch=64),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates of one device, as they are usually stated; bytes a second leave and arrive at once."""

    flops: float  # bfloat16, dense, a second
    memory: float  # bytes a second of its own memory
    near: float  # bytes a second to devices of the same group
    group: int  # devices that are near each other
    far: float  # bytes a second and device to other groups
    hop: float  # seconds that a message takes to a neighbour


DEVICES = {
    'TPU v4': Device(flops=275e12, memory=1.2e12, near=90e9, group=4096, far=6.25e9, hop=1e-6),
    'TPU v5e': Device(flops=197e12, memory=0.81e12, near=90e9, group=256, far=3.125e9, hop=1e-6),
    'H100, NVLink + 400 Gb/s each': Device(flops=989e12, memory=3.35e12, near=450e9, group=8, far=50e9, hop=5e-6),
}
UTILISATION = 0.35  # of the peak rate, by convolutions of this width where a device has enough images
STATE_TRAFFIC = 4 * 9  # bytes a parameter: gradient read; parameters, EMA, two moments read and written


def all_reduce_time(nbytes, devices, device):
    """Seconds to sum `nbytes` over all devices: rings within the groups, then between them, then within again.

    A ring of n moves 2·(n−1)/n·bytes through each link, in 2·(n−1) messages; between groups each of its
    devices reduces its own part, 1/group of the bytes. A group that is a torus of many devices takes
    2·(n^(1/2)−1)·2 hops at most, as rings run along each of its axes.
    """
    near = min(devices, device.group)
    far = math.ceil(devices / near)
    hops = 2 * (near - 1) if near <= 8 else 4 * (math.sqrt(near) - 1)
    within = 2 * (near - 1) / near * nbytes / device.near + hops * device.hop
    between = 2 * (far - 1) / far * nbytes / near / device.far + 2 * (far - 1) * device.hop
    return within + between


def step_time(network, device, devices, batch):
    """Seconds of a step: {'compute', 'update', 'reduce', 'step', 'hidden'}; parameters whole on each device.

    'step' waits for the reduction at the end of the step, 'hidden' starts it with the first gradients that are there.
    """
    compute = batch / devices * network['flops_an_image'] / (UTILISATION * device.flops)
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


def paper():
    """Rows (network, device, devices, batch, milliseconds …) of docs/scaling.md."""
    rows = []
    for name, network in NETWORKS.items():
        for kind, device in DEVICES.items():
            for devices in (8, 64, 256, 1024):
                for images in (network['batch'] // 8, 1):  # a device: as the paper's batch on eight; the least there is
                    times = step_time(network, device, devices, images * devices)
                    alone = step_time(network, device, 1, images)['step']
                    rows.append(
                        {'network': name, 'device': kind, 'devices': devices, 'batch': images * devices}
                        | {f'{key} ms': 1e3 * value for key, value in times.items()}
                        | {
                            'images a second': images * devices / times['step'],
                            'efficiency': alone / times['step'],
                            'efficiency, hidden': alone / times['hidden'],
                        }
                    )
    return rows


def markdown(rows):
    """The rows as docs/scaling.md shows them."""
    lines = [
        '| network | devices | number | batch | compute ms | update ms | reduce ms | step ms | images/s | efficiency |',
        '|---|---|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for row in rows:
        times = ' | '.join(f'{row[f"{key} ms"]:.3g}' for key in ('compute', 'update', 'reduce', 'step'))
        lines.append(
            f'| {row["network"]} | {row["device"]} | {row["devices"]:,} | {row["batch"]:,} | {times} | '
            f'{row["images a second"]:,.0f} | {row["efficiency"]:.0%} … {row["efficiency, hidden"]:.0%} |'
        )
    return '\n'.join(lines) + '\n'


def markdown_of_memory(result):
    """The bytes as docs/cluster.md shows them."""
    lines = ['| CIFAR-10 on a device | state, MB | temporary, MB |', '|---|---:|---:|']
    for name, found in result['CIFAR-10, bytes on a device'].items():
        lines.append(f'| {name} | {found["state"] / 1e6:,.0f} | {found["temporary"] / 1e6:,.0f} |')
    return '\n'.join(lines) + '\n'


def markdown_of_rates(result):
    """The images a second as docs/scaling.md shows them."""
    lines = ['| mesh | images/s | state, MB | temporary, MB |', '|---|---:|---:|---:|']
    for name, found in result['digits, batch of 64'].items():
        rate = found['images a second, median of three']
        lines.append(f'| {name} | {rate:,.0f} | {found["state"] / 1e6:.1f} | {found["temporary"] / 1e6:.1f} |')
    return '\n'.join(lines) + '\n'


# What follows runs in processes of its own, which know the number of their devices from XLA_FLAGS.


def compiled_step(config, batch=None):
    """(bytes of state, bytes of temporaries on a device) of a step that is compiled from shapes alone, and the step."""
    import jax
    import numpy as np

    from diffusion import experiment, train
    from diffusion.runtime import mesh as meshes

    exp = experiment.build(config)
    state = exp.abstract_state()
    split = meshes.split_batch(exp.mesh)
    size, channels = config.data.image_size, config.data.channels
    images = jax.ShapeDtypeStruct((batch or config.train.batch_size, size, size, channels), np.uint8, sharding=split)
    step = train.compile_step(config, exp, state, images, None)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    return exp, step, {'state': held, 'temporary': step.memory_analysis().temp_size_in_bytes}


def measure_rate(devices, fsdp, steps=20):
    """Images a second of the digits' network, and bytes on a device."""
    import jax
    import numpy as np

    from configs import digits
    from diffusion.runtime import mesh as meshes

    assert jax.device_count() == devices
    config = digits.get_config()
    config.mesh.fsdp, config.train.batch_size = fsdp, 64
    exp, step, found = compiled_step(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, exp.abstract_state())
    state = jax.jit(exp.init, out_shardings=shardings)(jax.random.key(0))
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


def measure_memory(fsdp, batch, **changes):
    """Bytes on a device for a step of the CIFAR-10 network."""
    from configs import cifar10

    config = cifar10.get_config()
    config.mesh.fsdp, config.train.batch_size = fsdp, batch
    config.update_from_flattened_dict(changes)
    return compiled_step(config)[2]


def in_a_process(devices, function, *args, **kwargs):
    """The result of one of the above with so many simulated devices."""
    program = (
        'import json, sys; from benchmarks import scaling; '
        'name, args, kwargs = json.loads(sys.argv[1]); '
        'print(json.dumps(getattr(scaling, name)(*args, **kwargs)))'
    )
    quick = '' if function is measure_rate else ' --xla_backend_optimization_level=0'  # only planned, not run
    done = subprocess.run(
        [sys.executable, '-c', program, json.dumps([function.__name__, args, kwargs])],
        env=os.environ
        | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}{quick}', 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


BATCH = 16  # images on a device
SAVINGS = {
    'as it is': {},
    'accumulate=4': {'train.accumulate': 4},
    'dtype=bfloat16': {'model.dtype': 'bfloat16'},
    'remat': {'model.remat': True},
    'remat, bfloat16': {'model.remat': True, 'model.dtype': 'bfloat16'},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--paper', action='store_true', help='print the table of docs/scaling.md, measure nothing')
    if parser.parse_args().paper:
        print(markdown(paper()), end='')
        return
    from benchmarks.record import store

    result = {
        'note': 'simulated devices share the cores, so that images a second cannot rise with their number',
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
