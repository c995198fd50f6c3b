"""Ours beside PyTorch's, in one run: the same networks, batches and precision, float32.

    make bench VENV=.venv-peers EXTRAS=test,peers      or      python -m benchmarks.peers [--repetitions=5]

The peer is diffusers' UNet2DModel with its DDIMScheduler, in eager mode and channels_last, torch.optim.Adam behind a
clipped gradient, and an EMA. Each side is a process of its own, which waits while the other one works; they take
turns, and what counts is the median of the ratios of neighbours. Without PyTorch ours is measured alone.
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import time

import numpy as np

TASKS = {  # how often a task is done at one turn
    'train step, CIFAR-10 network (35.7M), batch 16': 1,
    'DDIM-50, CIFAR-10 network (35.7M), 16 images': 1,
    'train step, digits network, batch 32': 50,
    'DDIM-50, digits network, 250 images': 1,
}


def settings(task):
    """(config, batch) of a task."""
    from configs import cifar10, digits

    config = (digits if 'digits' in task else cifar10).get_config()
    batch = int(task.rsplit(', ', 1)[1].removeprefix('batch ').removesuffix(' images'))
    config.train.batch_size = batch
    return config, batch


def images_of(config, batch):
    size, channels = config.data.image_size, config.data.channels
    return np.random.default_rng(0).integers(0, 256, (2 * batch, size, size, channels), dtype=np.uint8)


def ours(task):
    """A function that does the task once, and returns when it is done."""
    import jax

    from diffusion import experiment, generate, train
    from diffusion.schedule import timesteps

    config, batch = settings(task)
    exp = experiment.build(config)
    state = jax.jit(exp.init)(jax.random.key(0))
    images = images_of(config, batch)
    if task.startswith('train'):
        shown, indices = jax.device_put(images), jax.device_put(np.arange(batch, dtype=np.int32))
        step = train.compile_step(config, exp, state, shown, indices)

        def once():
            nonlocal state
            state, metrics = step(state, shown, indices)
            jax.block_until_ready(metrics)

        return once
    levels = timesteps(exp.schedule.T, 50)
    draw = generate.make_sampler(
        exp, state.ema, images.shape[1:], batch_size=batch, timesteps=levels, kind='eps', eta=0.0
    )
    return lambda: draw(state.ema, 0, 0, batch)


def theirs(task):
    """The same by PyTorch and diffusers."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    from diffusion.interop.diffusers import network_config

    config, batch = settings(task)
    keys = ('channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups', 'dropout')
    layout = network_config(
        image_size=config.data.image_size,
        image_channels=config.data.channels,
        **{key: config.model[key] for key in keys},
    )
    net = UNet2DModel.from_config(layout).to(memory_format=torch.channels_last)
    images = torch.from_numpy(images_of(config, batch)).permute(0, 3, 1, 2)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=True)
    if task.startswith('train'):
        parameters = list(net.parameters())
        ema = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.Adam(parameters, lr=config.train.learning_rate, foreach=True)

        def step():
            x0 = (images[:batch].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            t, eps = torch.randint(0, 1000, (batch,)), torch.randn_like(x0)
            loss = torch.nn.functional.mse_loss(net(scheduler.add_noise(x0, eps, t), t).sample, eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1 - config.train.ema_decay)
            return loss.item()

        return step
    net.eval()
    scheduler.set_timesteps(50)

    @torch.inference_mode()
    def sample():
        x = torch.randn(batch, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x, eta=0.0).prev_sample
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    return sample


def work(side, task):
    """For each line on standard input, do the task and print its seconds and the most memory so far, in bytes."""
    once = {'ours': ours, 'theirs': theirs}[side](task)
    for _ in range(2):
        once()
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(TASKS[task]):
            once()
        seconds = (time.perf_counter() - started) / TASKS[task]
        print(seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


def start(side, task):
    command = [sys.executable, '-m', 'benchmarks.peers', f'--side={side}', f'--task={task}']
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def turn(process):
    process.stdin.write('\n')
    process.stdin.flush()
    answer = process.stdout.readline().split()
    if not answer:
        sys.exit(f'{" ".join(process.args)} has ended before it answered')
    return tuple(map(float, answer))


def compare(task, sides, repetitions):
    """Medians of one task; sides: 'ours', and 'theirs' where they are installed."""
    processes = {}
    for side in sides:  # one after the other gets ready
        processes[side] = start(side, task)
        turn(processes[side])
    seconds = {side: [] for side in sides}
    for _ in range(repetitions):
        for side, process in processes.items():
            second, memory = turn(process)
            seconds[side].append(second)
            processes[side].memory = memory
    result = {}
    for side, process in processes.items():
        process.communicate()
        result[f'{side}, seconds, median'] = float(np.median(seconds[side]))
        result[f'{side}, peak megabytes of the process'] = process.memory / 1e6
    if len(sides) > 1:
        ratios = np.divide(seconds['ours'], seconds['theirs'])
        result['ours over theirs, median of the ratios'] = float(np.median(ratios))
        result['ours over theirs, all'] = ratios.tolist()
        ours, theirs = (result[f'{side}, peak megabytes of the process'] for side in sides)
        result['ours over theirs, memory'] = ours / theirs
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repetitions', type=int, default=5)
    parser.add_argument('--side', choices=['ours', 'theirs'], help='be one of the two processes')
    parser.add_argument('--task', choices=[*TASKS], help='one task alone')
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, asked.task)
        return
    from benchmarks.record import circumstances, store

    both = all(importlib.util.find_spec(name) for name in ('torch', 'diffusers'))
    sides = ('ours', 'theirs') if both else ('ours',)
    result = {}
    for task in [asked.task] if asked.task else TASKS:
        result[task] = compare(task, sides, asked.repetitions)
        print(task, result[task], flush=True)
    if both and not asked.task:
        import diffusers
        import torch

        about = circumstances('peers')
        about['versions'] |= {'torch': torch.__version__, 'diffusers': diffusers.__version__}
        store('peers', result | about)


if __name__ == '__main__':
    main()
