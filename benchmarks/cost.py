"""Measure what the framework costs beyond the network, with the digits' network on the default device.

    python -m benchmarks.cost

Three figures, each the median over interleaved repetitions:
- the compile time of the sampler for 1000 steps over that for 10;
- the seconds from the command to the first training step, with a warm compile cache;
- the time of the posterior-form ELBO of digits at T = 1000 over that of the same number of network evaluations alone.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import Task
from benchmarks.record import store
from diffusion import build
from diffusion.likelihood.elbo import elbo
from diffusion.modes.sample import make_sampler
from diffusion.runtime import mesh
from diffusion.schedule import timesteps


def seconds(function: Callable) -> float:
    """Return the seconds that a call takes, until its result is computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def compile_times(repetitions: int = 3, batch: int = 50) -> dict[int, float]:
    """Return the median seconds to compile the sampler, for 10 and for 1000 steps."""
    exp = build.build(Task('digits', batch).build())
    params = exp.network.init(jax.random.key(0))

    def compile_sampler(num_steps):
        levels = timesteps(exp.schedule.T, num_steps)
        make_sampler(exp, params, (8, 8, 1), batch_size=batch, timesteps=levels, kind='eps', eta=1.0)

    compile_sampler(20)  # warm up
    times = {10: [], 1000: []}
    for _ in range(repetitions):
        for num_steps, found in times.items():
            jax.clear_caches()
            found.append(seconds(lambda n=num_steps: compile_sampler(n)))
    return {num_steps: float(np.median(found)) for num_steps, found in times.items()}


def first_steps(repetitions: int = 3) -> list[float]:
    """Return the seconds from `python main.py --config=configs/digits.py …` to the log entry of step 1, for each run.

    One more run before them fills the compile cache.
    """
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
                    sys.exit(f'{" ".join(command)} ended before its first step')
                process.kill()
    return times[1:]


def elbo_ratios(name: str, *, images: int, batch: int, dtype: str = 'float32') -> list[float]:
    """Return, for each batch of images, the time of the ELBO over that of as many network evaluations."""
    config = Task(name, batch, dtype=dtype).build()
    exp = build.build(config)
    params = exp.network.init(jax.random.key(0))
    x0 = jnp.zeros((batch, config.data.image_size, config.data.image_size, config.data.channels))
    key = jax.random.key(0)

    def bound(params, key):
        return elbo(key, exp.schedule, exp.network.net(params), x0, kind='eps').total()

    def network(params, key):
        net = exp.network.net(params)

        def step(x, t):
            return net(x, jnp.full(batch, t)), None

        return jax.lax.scan(step, jax.random.normal(key, x0.shape), jnp.arange(exp.schedule.T, 0, -1))[0]

    whole = mesh.replicated(exp.mesh)
    compiled = [exp.implementation.compile(f, params, key, out_shardings=whole) for f in (bound, network)]
    functions = [lambda f=f: f(params, key) for f in compiled]
    for function in functions:
        seconds(function)  # warm up
    return [seconds(functions[0]) / seconds(functions[1]) for _ in range(images // batch)]


def main() -> None:
    """Measure, and store the figures."""
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
