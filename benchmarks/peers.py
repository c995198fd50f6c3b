"""Compare our training steps and samplers with PyTorch's in one run: same networks, batches and precision.

    make bench VENV=.venv-peers EXTRAS=test,peers
    python -m benchmarks.peers [--repetitions=5] [--implementation=auto|plain|cpu]

The peers are diffusers' UNet2DModel with its schedulers, channels_last, torch.optim.Adam after clipping, and an EMA.
There are two: `eager`, as users write it; and, on a GPU, `compiled` by torch.compile, the fastest that PyTorch offers.
Each side is a process of its own. The sides take turns, one at a time; the result is the median ratio of neighbouring
turns. Without PyTorch, only our side is measured.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

NETWORKS = {'cifar10': 'CIFAR-10 network (35.7M)', 'digits': 'digits network', 'mnist': 'MNIST network'}


@dataclasses.dataclass(frozen=True)
class Task:
    """A training step on `batch` images; or, if `num_steps` > 0, drawing `batch` images by DDIM (eta 0) or DDPM (1)."""

    config: str
    batch: int
    num_steps: int = 0
    eta: float = 0.0
    dtype: str = 'float32'
    times: int = 1  # repetitions within a turn
    tiny: bool = False  # with a network that compiles in a moment, to try the benchmark itself
    targets: dict[str, float] = dataclasses.field(default_factory=dict)  # {side: the largest ratio, ours/theirs}

    @property
    def name(self) -> str:
        """The name of the task in the tables."""
        precision = '' if self.dtype == 'float32' else f', {self.dtype}'
        if not self.num_steps:
            return f'train step, {NETWORKS[self.config]}, batch {self.batch}{precision}'
        method = 'DDPM' if self.eta else 'DDIM'
        return f'{method}-{self.num_steps}, {NETWORKS[self.config]}, {self.batch} images{precision}'

    def build(self) -> ConfigDict:
        """Return the config of the task."""
        from diffusion.configs import cifar10, digits, mnist

        config = {'cifar10': cifar10, 'digits': digits, 'mnist': mnist}[self.config].get_config()
        config.train.batch_size = self.batch
        config.model.dtype = self.dtype
        if self.tiny:
            config.model.update(channels=8, groups=4, multipliers=(1,), attention_resolutions=())
        return config

    def images(self, config: ConfigDict) -> np.ndarray:
        """Return random images for the task, (N, H, W, C) uint8."""
        size, channels = config.data.image_size, config.data.channels
        return np.random.default_rng(0).integers(0, 256, (2 * self.batch, size, size, channels), dtype=np.uint8)


TASKS = {  # for each benchmark
    'peers': [
        Task('cifar10', 16, targets={'eager': 1.0}),
        Task('cifar10', 16, num_steps=50, targets={'eager': 1.0}),
        Task('digits', 32, times=50, targets={'eager': 0.7}),
        Task('digits', 250, num_steps=50, targets={'eager': 0.7}),
        Task('mnist', 32, times=5, targets={'eager': 1.0}),
    ],
    'gpu': [
        Task('cifar10', 128, dtype='bfloat16', times=20, targets={'compiled': 0.75}),
        Task('cifar10', 1024, num_steps=50, dtype='bfloat16', targets={'compiled': 0.75}),
        Task('cifar10', 512, dtype='bfloat16', times=10, targets={'compiled': 0.75}),
        Task('cifar10', 256, num_steps=50, dtype='bfloat16', targets={'compiled': 0.75}),
    ],
    'rehearsal': [Task('digits', 4, times=2, tiny=True), Task('digits', 4, num_steps=2, tiny=True)],
}


def ours(task: Task, implementation: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a function that does the task once with our code, and one that waits until everything is done."""
    import jax

    from diffusion import build, data
    from diffusion.modes import sample, train
    from diffusion.runtime import mesh
    from diffusion.schedule import timesteps

    if task.num_steps:
        mesh.use_cores(task.batch)  # as --mode=sample does
    config = task.build()
    config.model.implementation = implementation
    exp = build.build(config)
    images = task.images(config)
    if task.num_steps:
        params = jax.jit(exp.network.init, out_shardings=mesh.replicated(exp.mesh))(jax.random.key(0))
        levels = timesteps(exp.schedule.T, task.num_steps)
        chain: dict[str, Any] = dict(timesteps=levels, kind='eps', eta=task.eta)
        draw = sample.make_sampler(exp, params, images.shape[1:], batch_size=task.batch, **chain)
        return lambda: data.to_uint8(draw(params, 0, 0, task.batch)), lambda: None
    state = exp.packed(exp.initial_state(jax.random.key(0)))
    batch = jax.device_put(images), jax.device_put(np.arange(task.batch, dtype=np.int32))
    step = train.compile_step(config, exp, state, *batch)
    last = None

    def once():
        nonlocal state, last
        before = last
        state, last = step(state, *batch)
        jax.block_until_ready(before)  # at most two steps are in flight, as in training

    return once, lambda: jax.block_until_ready(state)


def theirs(task: Task, compiled: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the same for PyTorch and diffusers."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    gpu = torch.cuda.is_available()
    device = torch.device('cuda' if gpu else 'cpu')
    config = task.build()
    net = UNet2DModel.from_config(layout_of(config)).to(device, memory_format=torch.channels_last)
    images = torch.from_numpy(task.images(config)).permute(0, 3, 1, 2).to(device)
    compile_it = torch.compile if compiled else lambda function: function

    def finish():
        if gpu:
            torch.cuda.synchronize()

    if not task.num_steps:
        scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        parameters = list(net.parameters())
        ema = [p.detach().clone() for p in parameters]
        adam = dict(fused=True) if gpu else dict(foreach=True)
        optimizer = torch.optim.Adam(parameters, lr=config.train.learning_rate, **adam)

        def mean_loss(x_t, t, eps):
            with torch.autocast(device.type, torch.bfloat16, enabled=task.dtype == 'bfloat16'):
                found = net(x_t, t).sample
            return torch.nn.functional.mse_loss(found.float(), eps)

        mean_loss = compile_it(mean_loss)

        def step():
            x0 = (images[: task.batch].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            t, eps = torch.randint(0, 1000, (task.batch,), device=device), torch.randn_like(x0)
            loss = mean_loss(scheduler.add_noise(x0, eps, t), t, eps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()  # here, so that gradients take no memory during the next forward pass
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1 - config.train.ema_decay)

        return step, finish

    net = net.eval().to(dict(float32=torch.float32, bfloat16=torch.bfloat16)[task.dtype])
    scheduler = (DDPMScheduler if task.eta else DDIMScheduler)(beta_start=1e-4, beta_end=0.02, clip_sample=True)
    how = {} if task.eta else {'use_clipped_model_output': True}  # as DDPM and ours do
    scheduler.set_timesteps(task.num_steps)
    a_bars = scheduler.alphas_cumprod.tolist()

    def update(x, t, a_t, a_s):
        """A step of the sampler, network included, as one program. a_t, a_s: ᾱ before and after."""
        eps = net(x.to(net.dtype), t).sample.float()
        x0 = ((x - (1 - a_t).sqrt() * eps) / a_t.sqrt()).clamp(-1, 1)
        eps = (x - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        variance = task.eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        x = a_s.sqrt() * x0 + (1 - a_s - variance).clamp(min=0).sqrt() * eps
        return x + variance.sqrt() * torch.randn_like(x) if task.eta else x

    update = compile_it(update)

    @torch.inference_mode()
    def sample():
        shape = (task.batch, *images.shape[1:])
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        levels = scheduler.timesteps.tolist()
        for t, s in zip(levels, [*levels[1:], None], strict=True):
            if compiled:
                a_t, a_s = torch.tensor([a_bars[t], 1.0 if s is None else a_bars[s]], device=device)
                x = update(x, torch.tensor(t, device=device), a_t, a_s)
            else:
                x = scheduler.step(net(x.to(net.dtype), t).sample.float(), t, x, **how).prev_sample
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    return sample, finish


def layout_of(config: ConfigDict) -> dict[str, Any]:
    """Return the config.json of diffusers' network with our layout."""
    from diffusion.modes.export import diffusers_network

    return diffusers_network(config)


SIDES = {
    'ours': ours,
    'eager': lambda task, _: theirs(task, compiled=False),
    'compiled': lambda task, _: theirs(task, compiled=True),
}


def sides() -> list[str]:
    """Return the sides that can be measured here, ours first."""
    if not all(importlib.util.find_spec(name) for name in ('torch', 'diffusers')):
        return ['ours']
    import torch

    return ['ours', 'eager', 'compiled'] if torch.cuda.is_available() else ['ours', 'eager']


def work(side: str, task: Task, implementation: str) -> None:
    """For each line on standard input, do the task, and print its seconds and the peak of memory since the start."""
    with contextlib.redirect_stdout(sys.stderr):  # standard output has the answers alone
        once, finish = SIDES[side](task, implementation)
        once()
        finish()
    forget_peak(side)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(task.times):
            once()
        finish()
        print((time.perf_counter() - started) / task.times, peak_memory(side), flush=True)


def forget_peak(side: str) -> None:
    """Reset the peak of memory, so that compilation does not count. JAX cannot do that on a GPU."""
    if side != 'ours':
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim:
        trim(0)
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')


def peak_memory(side: str) -> int:
    """Return the peak memory in bytes: of the GPU, as the framework counts it, or of the process, as Linux does."""
    if side == 'ours':
        import jax

        if jax.default_backend() != 'cpu':
            return jax.devices()[0].memory_stats()['peak_bytes_in_use']
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    with open('/proc/self/status') as file:
        return 1024 * int(next(line for line in file if line.startswith('VmHWM')).split()[1])


def start(side: str, task: Task, implementation: str) -> subprocess.Popen:
    """Start the process of a side."""
    command = [sys.executable, '-m', 'benchmarks.peers', f'--side={side}', f'--task={task.name}']
    command.append(f'--implementation={implementation}')
    pipe = subprocess.PIPE
    environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def ask(process: subprocess.Popen) -> None:
    """Let a side do the task."""
    assert process.stdin
    process.stdin.write('\n')
    process.stdin.flush()


def answer_of(process: subprocess.Popen) -> tuple[float, ...]:
    """Wait until a side has done the task; return (seconds, bytes)."""
    assert process.stdout
    answer = process.stdout.readline().split()
    if not answer:
        sys.exit(f'{process.args!r} ended before it answered')
    return tuple(map(float, answer))


def compare(task: Task, sides: Sequence[str], repetitions: int, implementation: str = 'auto') -> dict[str, dict]:
    """Measure all sides in turns.

    Returns:
        {'seconds': {side: [of each repetition]}, 'megabytes': {side: peak}}.
    """
    processes = {}
    for side in sides:  # one after the other: a compiler that measures what is fastest must be alone
        began = time.perf_counter()
        processes[side] = start(side, task, implementation)
        ask(processes[side])
        seconds, _ = answer_of(processes[side])  # shown, but not counted
        print(f'{task.name}, {side}: {seconds:.4g} s; ready after {time.perf_counter() - began:.0f} s', flush=True)
    found: dict[str, list] = {side: [] for side in sides}
    for _ in range(repetitions):
        for side, process in processes.items():
            ask(process)
            found[side].append(answer_of(process))
    for process in processes.values():
        process.communicate()
    return {
        'seconds': {side: [seconds for seconds, _ in turns] for side, turns in found.items()},
        'megabytes': {side: max(memory for _, memory in turns) / 1e6 for side, turns in found.items()},
    }


def ratios(result: dict[str, dict], side: str) -> np.ndarray:
    """Return the ratio of times, ours/theirs, of each repetition."""
    return np.divide(result['seconds']['ours'], result['seconds'][side])


def summary(task: Task, result: dict[str, dict]) -> str:
    """Return one line with the figures of a task."""
    found = f'{task.name}: {np.median(result["seconds"]["ours"]):.4g} s'
    for side in result['seconds']:
        if side != 'ours':
            each = ratios(result, side)
            found += f'; over {side} {np.median(each):.2f} ({each.min():.2f} … {each.max():.2f})'
            found += f', memory {result["megabytes"]["ours"] / result["megabytes"][side]:.2f}'
    return found


def peer_versions() -> dict[str, str]:
    """Return the versions of the peers' packages."""
    return {name: importlib.metadata.version(name) for name in ('torch', 'diffusers') if importlib.util.find_spec(name)}


def main() -> None:
    """Compare all sides; with --side, run as one of them."""
    tasks = {task.name: task for of_kind in TASKS.values() for task in of_kind}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repetitions', type=int, default=5)
    parser.add_argument('--implementation', choices=['auto', 'plain', 'cpu'], default='auto', help='of our network')
    parser.add_argument('--side', choices=[*SIDES], help='run as the process of one side')
    parser.add_argument('--task', choices=[*tasks], help='do one task, and do not store its figures')
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, tasks[asked.task], asked.implementation)
        return
    from benchmarks.record import store

    result = {}
    for task in [tasks[asked.task]] if asked.task else TASKS['peers']:
        result[task.name] = compare(task, sides(), asked.repetitions, asked.implementation)
        print(summary(task, result[task.name]), flush=True)
    if not asked.task:
        name = 'peers' if asked.implementation == 'auto' else f'peers --implementation={asked.implementation}'
        store(name, {'tasks': result}, **peer_versions())


if __name__ == '__main__':
    main()
