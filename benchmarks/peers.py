"""Ours beside PyTorch's, in one run: the same networks, batches and precision.

    make bench VENV=.venv-peers EXTRAS=test,peers      or      python -m benchmarks.peers [--repetitions=5]

The peers are diffusers' UNet2DModel with its schedulers, channels_last, torch.optim.Adam behind a clipped gradient,
and an EMA: `eager` as one writes it; `compiled`, on a GPU, by torch.compile, the best PyTorch can do. Each side is a
process of its own, which waits while the others work; they take turns, and what counts is the median of the ratios of
neighbours. Without PyTorch ours is measured alone.
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

import numpy as np

NETWORKS = {'cifar10': 'CIFAR-10 network (35.7M)', 'digits': 'digits network'}


@dataclasses.dataclass(frozen=True)
class Task:
    """A train step on `batch` images; or where num_steps is given, to draw as many by DDIM (eta 0) or DDPM (eta 1)."""

    config: str
    batch: int
    num_steps: int = 0
    eta: float = 0.0
    dtype: str = 'float32'
    times: int = 1  # that it is done at one turn
    targets: dict = dataclasses.field(default_factory=dict)  # {side: what ours over theirs should not exceed}

    @property
    def name(self):
        precision = '' if self.dtype == 'float32' else f', {self.dtype}'
        if not self.num_steps:
            return f'train step, {NETWORKS[self.config]}, batch {self.batch}{precision}'
        method = 'DDPM' if self.eta else 'DDIM'
        return f'{method}-{self.num_steps}, {NETWORKS[self.config]}, {self.batch} images{precision}'

    def build(self):
        """The config of the task."""
        from configs import cifar10, digits

        config = {'cifar10': cifar10, 'digits': digits}[self.config].get_config()
        config.train.batch_size = self.batch
        config.model.dtype = self.dtype
        return config

    def images(self, config):
        size, channels = config.data.image_size, config.data.channels
        return np.random.default_rng(0).integers(0, 256, (2 * self.batch, size, size, channels), dtype=np.uint8)


BEST = {'eager': 0.5, 'compiled': 0.75}
TASKS = {  # of each benchmark
    'peers': [
        Task('cifar10', 16, targets={'eager': 1.0}),
        Task('cifar10', 16, num_steps=50, targets={'eager': 1.0}),
        Task('digits', 32, times=50, targets={'eager': 0.7}),
        Task('digits', 250, num_steps=50, targets={'eager': 0.7}),
    ],
    'gpu': [
        Task('cifar10', 128, dtype='bfloat16', times=20, targets={'compiled': 0.75}),
        Task('cifar10', 512, dtype='bfloat16', times=10, targets={'compiled': 0.75}),
        Task('cifar10', 256, num_steps=50, dtype='bfloat16', targets=BEST),
        Task('cifar10', 1024, num_steps=50, dtype='bfloat16', targets=BEST),
        Task('cifar10', 256, num_steps=100, eta=1.0, dtype='bfloat16', targets=BEST),
        Task('cifar10', 1024, num_steps=100, eta=1.0, dtype='bfloat16', targets=BEST),
    ],
}


def ours(task):
    """A function that does the task once, and one that waits until all is done."""
    import jax

    from diffusion import data, experiment, generate, train
    from diffusion.runtime import mesh as meshes
    from diffusion.schedule import timesteps

    if task.num_steps:
        meshes.use_cores(task.batch)  # as --mode=sample does
    config = task.build()
    exp = experiment.build(config)
    images = task.images(config)
    if task.num_steps:
        params = jax.jit(exp.network.init, out_shardings=meshes.replicated(exp.mesh))(jax.random.key(0))
        levels = timesteps(exp.schedule.T, task.num_steps)
        how = dict(batch_size=task.batch, timesteps=levels, kind='eps', eta=task.eta)
        draw = generate.make_sampler(exp, params, images.shape[1:], **how)
        return lambda: data.to_uint8(draw(params, 0, 0, task.batch)), lambda: None
    state = jax.jit(exp.init)(jax.random.key(0))
    shown, indices = jax.device_put(images), jax.device_put(np.arange(task.batch, dtype=np.int32))
    step = train.compile_step(config, exp, state, shown, indices)
    last = None

    def once():
        nonlocal state, last
        before = last
        state, last = step(state, shown, indices)
        jax.block_until_ready(before)  # as in training: one step is under way while the next is sent

    return once, lambda: jax.block_until_ready(state)


def theirs(task, compiled):
    """The same by PyTorch and diffusers."""
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
            optimizer.zero_grad()  # here, and the gradients take no memory while the next step goes forward
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1 - config.train.ema_decay)

        return step, finish

    net = net.eval().to(dict(float32=torch.float32, bfloat16=torch.bfloat16)[task.dtype])
    scheduler = (DDPMScheduler if task.eta else DDIMScheduler)(beta_start=1e-4, beta_end=0.02, clip_sample=True)
    how = {} if task.eta else {'use_clipped_model_output': True}  # as DDPM does, and ours
    scheduler.set_timesteps(task.num_steps)
    a_bars = scheduler.alphas_cumprod.tolist()

    def update(x, t, a_t, a_s):
        """A step of the sampler, network and rule as one program. a_t, a_s: ᾱ before and after."""
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


def layout_of(config):
    """The config.json of diffusers' network of the same layout as ours."""
    from diffusion.interop.diffusers import network_config

    keys = ('channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups', 'dropout')
    size, channels = config.data.image_size, config.data.channels
    return network_config(image_size=size, image_channels=channels, **{key: config.model[key] for key in keys})


SIDES = {
    'ours': ours,
    'eager': lambda task: theirs(task, compiled=False),
    'compiled': lambda task: theirs(task, compiled=True),
}


def sides():
    """Those that can be measured here, ours first."""
    if not all(importlib.util.find_spec(name) for name in ('torch', 'diffusers')):
        return ['ours']
    import torch

    return ['ours', 'eager', 'compiled'] if torch.cuda.is_available() else ['ours', 'eager']


def work(side, task):
    """For each line on standard input, do the task and print its seconds and the most memory since the first one."""
    once, finish = SIDES[side](task)
    once()
    finish()
    forget_peak(side)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(task.times):
            once()
        finish()
        print((time.perf_counter() - started) / task.times, peak_memory(side), flush=True)


def forget_peak(side):
    """From here on, the most memory is that of the work; what compilers took and gave back does not count.

    But for JAX on a GPU, which does not forget.
    """
    if side != 'ours':
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim:
        trim(0)
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')


def peak_memory(side):
    """Bytes: of the GPU, as the framework counts them; or of the process, as Linux does."""
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


def start(side, task):
    command = [sys.executable, '-m', 'benchmarks.peers', f'--side={side}', f'--task={task.name}']
    pipe = subprocess.PIPE
    environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)


def turn(process):
    """(seconds, bytes) of one turn."""
    process.stdin.write('\n')
    process.stdin.flush()
    answer = process.stdout.readline().split()
    if not answer:
        sys.exit(f'{" ".join(process.args)} has ended before it answered')
    return tuple(map(float, answer))


def compare(task, sides, repetitions):
    """{'seconds': {side: [of each repetition]}, 'megabytes': {side: at most}}."""
    processes = {side: start(side, task) for side in sides}
    for process in processes.values():
        turn(process)
    found = {side: [] for side in sides}
    for _ in range(repetitions):
        for side, process in processes.items():
            found[side].append(turn(process))
    for process in processes.values():
        process.communicate()
    return {
        'seconds': {side: [seconds for seconds, _ in of_side] for side, of_side in found.items()},
        'megabytes': {side: max(memory for _, memory in of_side) / 1e6 for side, of_side in found.items()},
    }


def ratios(result, side):
    """Ours over theirs, of each repetition."""
    return np.divide(result['seconds']['ours'], result['seconds'][side])


def summary(task, result):
    """One line."""
    found = f'{task.name}: {np.median(result["seconds"]["ours"]):.4g} s'
    for side in result['seconds']:
        if side != 'ours':
            of_side = ratios(result, side)
            found += f'; over {side} {np.median(of_side):.2f} ({of_side.min():.2f} … {of_side.max():.2f})'
            found += f', memory {result["megabytes"]["ours"] / result["megabytes"][side]:.2f}'
    return found


def peer_versions():
    return {name: importlib.metadata.version(name) for name in ('torch', 'diffusers') if importlib.util.find_spec(name)}


def main():
    tasks = {task.name: task for of_kind in TASKS.values() for task in of_kind}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repetitions', type=int, default=5)
    parser.add_argument('--side', choices=[*SIDES], help='be one of the processes')
    parser.add_argument('--task', choices=[*tasks], help='one task alone, whose figures are not kept')
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, tasks[asked.task])
        return
    from benchmarks.record import store

    result = {}
    for task in [tasks[asked.task]] if asked.task else TASKS['peers']:
        result[task.name] = compare(task, sides(), asked.repetitions)
        print(summary(task, result[task.name]), flush=True)
    if not asked.task:
        store('peers', {'tasks': result}, **peer_versions())


if __name__ == '__main__':
    main()
