"""What the framework costs beyond the network, on the digits' network and whatever device is there.

    python -m benchmarks.cost

Compile time of the sampler for 10 and 1000 steps; seconds from the start of a program that trains to its first step,
where its programs have been compiled before; and the time of the posterior-form ELBO of digits at T = 1000 in units of
the same number of network evaluations alone. Medians over interleaved repetitions.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import Task
from benchmarks.record import store
from diffusion import experiment, generate
from diffusion.likelihood.elbo import elbo
from diffusion.runtime.xla import compiler_options
from diffusion.schedule import timesteps


def seconds(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def compile_times(repetitions=3, batch=50):
    """Median seconds to compile the sampler for 10 and for 1000 steps."""
    config = Task('digits', batch).build()
    exp = experiment.build(config)
    params = exp.network.init(jax.random.key(0))

    def build(num_steps):
        levels = timesteps(exp.schedule.T, num_steps)
        generate.make_sampler(exp, params, (8, 8, 1), batch_size=batch, timesteps=levels, kind='eps', eta=1.0)

    build(20)  # what is only done once
    times = {10: [], 1000: []}
    for _ in range(repetitions):
        for num_steps, found in times.items():
            jax.clear_caches()
            found.append(seconds(lambda n=num_steps: build(n)))
    return {num_steps: float(np.median(found)) for num_steps, found in times.items()}


def first_steps(repetitions=3):
    """Seconds from typing `python main.py --config=configs/digits.py …` to the record of step 1."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1 + repetitions):
            workdir = os.path.join(folder, str(i))
            changes = {'compile_cache': os.path.join(folder, 'compiled'), 'train.log_every': 1}
            flags = [f'--config.{key}={value}' for key, value in changes.items()]
            started = time.perf_counter()
            command = [sys.executable, 'main.py', '--config=configs/digits.py', f'--workdir={workdir}', *flags]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                log = os.path.join(workdir, 'logs', 'metrics.jsonl')
                while process.poll() is None and not (os.path.exists(log) and os.path.getsize(log)):
                    time.sleep(0.01)
                times.append(time.perf_counter() - started)
                if process.poll() is not None:
                    sys.exit(f'{" ".join(command)} has ended before its first step')
                process.kill()
    return times[1:]


def elbo_ratios(name, *, images, batch, dtype='float32'):
    """Seconds of the ELBO over those of as many network evaluations, for each batch of the images in turn."""
    config = Task(name, batch, dtype=dtype).build()
    exp = experiment.build(config)
    params = exp.network.init(jax.random.key(0))
    x0 = jnp.zeros((batch, config.data.image_size, config.data.image_size, config.data.channels))

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def bound(params, key):
        return elbo(key, exp.schedule, exp.network.net(params), x0, kind='eps').total()

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def network(params, key):
        net = exp.network.net(params)

        def step(x, t):
            return net(x, jnp.full(batch, t)), None

        return jax.lax.scan(step, jax.random.normal(key, x0.shape), jnp.arange(exp.schedule.T, 0, -1))[0]

    functions = [lambda f=f: f(params, jax.random.key(0)) for f in (bound, network)]
    for function in functions:
        seconds(function)
    return [seconds(functions[0]) / seconds(functions[1]) for _ in range(images // batch)]


def main():
    compiled = compile_times()
    ratios = elbo_ratios('digits', images=250, batch=50)
    first = first_steps()
    result = {
        'sampler compile seconds': compiled,
        'sampler compile time, 1000 steps over 10': compiled[1000] / compiled[10],
        'seconds to the first step, compiled before, median': float(np.median(first)),
        'seconds to the first step, compiled before, all': first,
        'ELBO over network evaluations alone, median of the batches': float(np.median(ratios)),
        'ELBO over network evaluations alone, all batches': ratios,
    }
    store('cost', result)


if __name__ == '__main__':
    main()
