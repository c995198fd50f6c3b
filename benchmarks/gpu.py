"""Check and measure on one GPU: outputs and losses, ours beside PyTorch's, kernels of a training step.

    python -m benchmarks.gpu [check] [table] [kernels] [--seconds=300] [--repetitions=3] [--rehearse]
    python -m benchmarks.gpu beside --run=WORKDIR

`check` compares outputs and losses with those on the CPU, `table` compares times with those of PyTorch and diffusers,
if they are installed, and `kernels` profiles a training step. The figures are stored as they come, so that a run which
is stopped has lost only what it was measuring. --rehearse does the same with a small network on any device, and stores
nothing. `beside` prints what --mode=plan says of a training step beside what the run in the same workdir measured.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the peers use the same GPU

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import cost, peers
from benchmarks.peers import TASKS, Task, compare, layout_of, peer_versions, sides, summary
from benchmarks.record import store
from diffusion.util import read_json

STEP_FLOP = 37.3e9  # per image of a training step of the CIFAR-10 network, in convolutions and matrix products


def outputs(task: Task, batch: int = 8) -> dict[str, np.ndarray]:
    """Return the outputs of one network for the same images.

    Args:
        task: whose network it is.
        batch: B.

    Returns:
        {'CPU': in float32, 'float32' and 'bfloat16': on the default device, 'diffusers': in float32 if it is
        installed}, each (B, H, W, C).
    """
    from diffusion import build

    config = task.build()
    t, size = np.arange(batch) * 1000 // batch + 1, config.data.image_size
    x = np.random.default_rng(0).normal(size=(batch, size, size, config.data.channels)).astype(np.float32)
    leaves, treedef = jax.tree.flatten(jax.jit(build.build(config).network.init)(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))  # no layer stays at zero
    leaves = [p + 0.02 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
    params = jax.device_get(jax.tree.unflatten(treedef, leaves))
    found = {}
    for who, dtype, device in (
        ('CPU', 'float32', jax.devices('cpu')[0]),
        ('float32', 'float32', jax.devices()[0]),
        ('bfloat16', 'bfloat16', jax.devices()[0]),
    ):
        config.model.dtype = dtype
        config.model.implementation = 'plain' if who == 'CPU' else 'auto'
        net = build.build(config).network.net
        precision = 'float32' if dtype == 'float32' else 'default'
        with jax.default_matmul_precision(precision), jax.default_device(device):
            found[who] = np.asarray(jax.jit(lambda p, x, t, net=net: net(p)(x, t))(params, x, jnp.asarray(t)))
    if len(sides()) > 1:
        config.model.dtype = 'float32'
        found['diffusers'] = diffusers_output(config, params, x, t)
    return found


def diffusers_output(config: ConfigDict, params: dict, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the output of diffusers' network with our parameters, (B, H, W, C)."""
    import torch
    from diffusers import UNet2DModel

    from diffusion.interop import diffusers_export

    with tempfile.TemporaryDirectory() as folder:
        diffusers_export.write(folder, jax.device_get(params), network=layout_of(config), scheduler={})
        net = UNet2DModel.from_pretrained(os.path.join(folder, 'unet'), low_cpu_mem_usage=False).eval()
    net = net.to('cuda' if torch.cuda.is_available() else 'cpu')
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        found = net(torch.from_numpy(x).permute(0, 3, 1, 2).to(net.device), torch.from_numpy(t).to(net.device)).sample
    return found.permute(0, 2, 3, 1).cpu().numpy()


def losses(task: Task, device: jax.Device, implementation: str, steps: int) -> np.ndarray:
    """Return the losses of the first training steps of a task on the digits, in float32."""
    from diffusion import build
    from diffusion.modes import train

    config = task.build()
    config.model.implementation = implementation
    mesh = jax.sharding.Mesh(np.array([[device]]), ('data', 'fsdp'))
    exp = dataclasses.replace(build.build(config), mesh=mesh)
    state = exp.packed(exp.initial_state(jax.random.key(0)))
    config.train.num_steps = steps
    batches = train.feed(config, exp, build.load_images(config), 0)
    step, found = None, []
    with jax.default_matmul_precision('float32'):
        for batch in batches:
            step = step or train.compile_step(config, exp, state, *batch)
            state, metrics = step(state, *batch)
            found.append(metrics['loss'])
    return np.array(jax.device_get(found))


def check(task: Task, steps: int) -> dict[str, float]:
    """Compare outputs, RMS(difference)/RMS(output), and the losses of the first steps, with those on the CPU.

    Args:
        task: whose network has its outputs compared.
        steps: how many training steps on the digits are compared.

    Raises:
        ValueError: a difference is too large.
    """
    found = outputs(task)
    exact = found.pop('CPU')
    errors: dict[str, float] = {
        who: float(np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2))) for who, out in found.items()
    }
    print(errors, flush=True)
    on_digits = Task('digits', 32, tiny=task.tiny)
    here = losses(on_digits, jax.devices()[0], 'auto', steps)
    on_cpu = losses(on_digits, jax.devices('cpu')[0], 'plain', steps)
    errors[f'losses of {steps} steps'] = float(np.abs(here / on_cpu - 1).max())
    allowed = {'float32': 1e-4, 'bfloat16': 0.05, 'diffusers': 1e-3, f'losses of {steps} steps': 0.02}
    wrong = [f'{who} by {error:.2g}' for who, error in errors.items() if not error < allowed[who]]
    if wrong:
        raise ValueError(f'results differ from those of the CPU: {", ".join(wrong)}')
    return errors


def matrix_rate(size: int = 8192, repetitions: int = 20) -> float:
    """Return the FLOP/s of square matrix products in bfloat16."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    b = jax.block_until_ready(product(a, a))
    started = time.perf_counter()
    for _ in range(repetitions):
        b = product(a, b)
    jax.block_until_ready(b)
    return 2 * size**3 * repetitions / (time.perf_counter() - started)


def kernels(task: Task, steps: int = 3) -> dict[str, Any]:
    """Profile training steps.

    Returns:
        'kernels of a step': how many ran on the GPU; 'milliseconds of a step': their time; 'kernels': of the 100 names
        with the most time, {name: [kernels of a step, milliseconds of a step]}.
    """
    once, finish = peers.ours(task, 'auto')
    once()
    finish()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                once()
            finish()
        events: list[dict] = []
        for path in glob.glob(os.path.join(folder, '**', '*.trace.json.gz'), recursive=True):
            with gzip.open(path, 'rt') as file:
                events += json.load(file)['traceEvents']
    devices = {
        event['pid']
        for event in events
        if event.get('name') == 'process_name' and '/device:GPU' in event['args']['name']
    }
    streams = {
        (event['pid'], event['tid'])
        for event in events
        if event.get('name') == 'thread_name' and event['pid'] in devices and 'Stream' in event['args']['name']
    }
    count, time_of = collections.Counter[str](), collections.Counter[str]()
    for event in events:
        if event.get('ph') == 'X' and (event['pid'], event.get('tid')) in streams:
            count[event['name']] += 1
            time_of[event['name']] += event['dur'] / 1000
    longest = {name: [count[name] / steps, milliseconds / steps] for name, milliseconds in time_of.most_common(100)}
    return {
        'kernels of a step': count.total() / steps,
        'milliseconds of a step': sum(time_of.values()) / steps,
        'kernels': longest,
    }


def beside(run: str) -> dict[str, Any]:
    """Return what was planned of a training step, beside what its run measured.

    Args:
        run: a workdir, in which --mode=train and then --mode=plan have run.

    Returns:
        'bytes of a device': 'planned', and 'measured' from the start of the process on, so with compilation and sheets
        of samples, None if the device does not say; 'seconds of a step': by the plan 'at least', and 'sum' as if
        arithmetic, memory and messages followed each other, None if they are not known, and 'measured', the median of
        the 'intervals' between two lines of the log.
    """
    plan = read_json(max(glob.glob(os.path.join(glob.escape(run), 'plan', '*.json')), key=os.path.getmtime))
    with open(os.path.join(run, 'logs', 'metrics.jsonl'), encoding='utf-8') as file:
        logged = [json.loads(line) for line in file]
    planned = plan['programs']['train']
    rate = float(np.median([line['images_per_second'] for line in logged]))
    return {
        'bytes of a device': {'planned': planned['peak_bytes'], 'measured': logged[-1].get('peak_bytes')},
        'seconds of a step': {
            'at least': planned['bound']['seconds'],
            'sum': planned['bound']['sum'],
            'measured': planned['images'] / rate,
        },
        'intervals': len(logged),
    }


def table(tasks: list[Task], repetitions: int, seconds: float, keep: Callable[[dict], None]) -> None:
    """Compare the times of tasks, as many as `seconds` allow; `keep` is given {'rates', 'tasks'} after each."""
    began, result = time.perf_counter(), {}
    rates = {'matrix products, FLOP/s': matrix_rate(*(() if jax.default_backend() == 'gpu' else (256, 2)))}
    for task in tasks:
        if time.perf_counter() - began > seconds:
            print(f'{task.name}: no time is left', flush=True)
            continue
        result[task.name] = compare(task, sides(), repetitions)
        print(summary(task, result[task.name]), flush=True)
        rate = task.batch * max(task.num_steps, 1) / np.median(result[task.name]['seconds']['ours'])
        if task.num_steps:
            rates[f'{task.name}: network evaluations per second'] = rate
        elif task.config == 'cifar10':
            share = rate * STEP_FLOP / rates['matrix products, FLOP/s']
            rates[f'{task.name}: share of the rate of matrix products'] = share
        keep({'rates': rates, 'tasks': result})
    if tasks == TASKS['gpu'] and time.perf_counter() - began < seconds:
        bound = cost.elbo_ratios('cifar10', images=500, batch=250, dtype='bfloat16')
        rates['ELBO over network evaluations alone'] = float(np.median(bound))
        keep({'rates': rates, 'tasks': result})


def main() -> None:
    """Do the parts that are asked for, and store their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', metavar='part', help='check, table, kernels; all three if none is given')
    parser.add_argument('--repetitions', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=300, help='after which `table` begins no other task')
    parser.add_argument('--rehearse', action='store_true')
    parser.add_argument('--run', help='the workdir whose plan `beside` compares with its log')
    asked = parser.parse_args()
    if asked.parts == ['beside']:
        print(json.dumps(beside(asked.run), indent=2))
        return
    if jax.default_backend() != 'gpu' and not asked.rehearse:
        parser.exit(2, f'there is no GPU, only {jax.devices()[0].device_kind}\n')

    def keep(name, result):
        if asked.rehearse:
            print(name, json.dumps(result, indent=2))
        else:
            store(name, result, **peer_versions())

    tasks = TASKS['rehearsal' if asked.rehearse else 'gpu']
    doing = {
        'check': lambda: keep('gpu check', {'differences from the CPU': check(tasks[0], 3 if asked.rehearse else 50)}),
        'table': lambda: table(tasks, asked.repetitions, asked.seconds, functools.partial(keep, 'gpu')),
        'kernels': lambda: keep('gpu kernels', kernels(tasks[0])),
    }
    for part in asked.parts or doing:
        doing[part]()


if __name__ == '__main__':
    main()
