"""What the framework costs beyond the network, on the digits' network and whatever device is there.

    python -m benchmarks.cost

Compile time of the sampler for 10 and 1000 steps, and the time of the posterior-form ELBO of 1,000 digits at
T = 1000 in units of the same number of network evaluations alone. Medians over interleaved repetitions.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import circumstances, store
from configs import digits
from diffusion import experiment, generate
from diffusion.likelihood.elbo import elbo
from diffusion.schedule import timesteps

BATCH, SHAPE, IMAGES = 50, (8, 8, 1), 1000


def seconds(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def compile_times(exp, params, repetitions=3):
    """Median seconds to compile the sampler for 10 and for 1000 steps."""

    def build(num_steps):
        levels = timesteps(exp.schedule.T, num_steps)
        generate.make_sampler(exp, params, SHAPE, batch_size=BATCH, timesteps=levels, kind='eps', eta=1.0)

    build(20)  # what is only done once
    times = {10: [], 1000: []}
    for _ in range(repetitions):
        for num_steps, found in times.items():
            jax.clear_caches()
            found.append(seconds(lambda n=num_steps: build(n)))
    return {num_steps: float(np.median(found)) for num_steps, found in times.items()}


def elbo_ratios(exp, params):
    """Seconds of the ELBO over those of as many network evaluations, for each batch of IMAGES in turn."""
    x0 = jnp.zeros((BATCH, *SHAPE))

    @jax.jit
    def bound(params, key):
        return elbo(key, exp.schedule, exp.network.net(params), x0, kind='eps').total()

    @jax.jit
    def network(params, key):
        net = exp.network.net(params)
        levels = jnp.arange(exp.schedule.T, 0, -1)
        return jax.lax.scan(lambda x, t: (net(x, jnp.full(BATCH, t)), None), jax.random.normal(key, x0.shape), levels)[
            0
        ]

    functions = [lambda f=f: f(params, jax.random.key(0)) for f in (bound, network)]
    for function in functions:
        seconds(function)
    return [seconds(functions[0]) / seconds(functions[1]) for _ in range(IMAGES // BATCH)]


def main():
    exp = experiment.build(digits.get_config())
    params = exp.network.init(jax.random.key(0))
    compiled = compile_times(exp, params)
    ratios = elbo_ratios(exp, params)
    result = {
        'sampler compile seconds': compiled,
        'sampler compile time, 1000 steps over 10': compiled[1000] / compiled[10],
        'ELBO of 1,000 images over network evaluations alone, median of the batches': float(np.median(ratios)),
        'ELBO of 1,000 images over network evaluations alone, all batches': ratios,
        **circumstances('cost'),
    }
    store('cost', result)


if __name__ == '__main__':
    main()
