"""The sampler: one loop over (t, s) pairs around one kernel, from DDPM (η = 1) to DDIM (η = 0)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import gaussian


def sample(
    keys, schedule, net, *, shape, timesteps, kind, eta, variance='small', clip=True, last_noise=False, x_T=None
):
    """Draw images: x_T ~ N(0, I), then x_s = mean + std·z for each pair (t, s) of `timesteps`.

    mean and std are `gaussian.posterior` of what the network predicts; `variance`, 'small' | 'large' |
    array (num_steps,), may replace std² (`gaussian.own_variance`).

    No noise is added at s = 0, whatever the variance, but with `last_noise`. With η = 0 and 'small' the program
    draws no noise but x_T. Image i depends on keys[i] alone: level s draws from fold_in(keys[i], s).

    keys: (N,) typed PRNG keys; net: (x_t (N, *shape), t (N,)) → (N, *shape), its output of `kind`;
    shape: of one image; timesteps: (num_steps+1,) levels, decreasing to 0 (`schedule.timesteps`), or
    (num_steps, 2) pairs (t, s) that need not meet, as other codebases have them (`compat.resolve`);
    eta: Python float in [0, 1]; clip: x̂_0 to [−1, 1] at each step, as `gaussian.predict` does;
    x_T: (N, *shape), drawn if None.
    Returns x_0 (N, *shape) float32.
    Raises ValueError for keys that are not typed or not (N,), for levels that do not decrease to 0 or leave the
    schedule, for pairs without s < t, for another variance, for 'large' with eta = 0 (DDIM adds no noise), for
    another shape of x_T, and for kind 'eps' from a level where ᾱ is 0.
    """
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1:
        raise ValueError(
            f'keys are {keys.dtype} of the shape {keys.shape}, but one typed key an image is needed, (N,): '
            'jax.random.split(jax.random.key(seed), N)'
        )
    t, s = _pairs(schedule, kind, np.asarray(timesteps))
    own_std = gaussian.own_variance(schedule, variance, s, t, eta=eta)
    if own_std is not None:
        own_std = jnp.where((s > 0) | last_noise, jnp.sqrt(own_std), 0)
    stochastic = eta > 0 or own_std is not None

    def noise(level):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), shape))(keys)

    def step(x_t, pair):
        t, s, own_std = pair
        output = net(x_t, jnp.full(keys.shape, t)).astype(jnp.float32)
        prediction = gaussian.predict(schedule, kind, output, x_t, t, clip=clip)
        x_s, std = gaussian.posterior(schedule, prediction, s, t, eta=eta)
        if stochastic:
            x_s += (std if own_std is None else own_std) * noise(s)
        return x_s, None

    if x_T is None:
        x_T = noise(t[0])
    if jnp.shape(x_T) != (*keys.shape, *shape):
        raise ValueError(f'x_T has the shape {jnp.shape(x_T)}, but the keys and shape ask for {(*keys.shape, *shape)}')
    x0, _ = jax.lax.scan(step, jnp.asarray(x_T, jnp.float32), (t, s, own_std))
    return x0


def _pairs(schedule, kind, timesteps):
    """The pairs as arrays (t, s), from the levels of a chain or from pairs that need not meet."""
    if timesteps.ndim != 2:
        return gaussian.chain(schedule, kind, timesteps)
    if timesteps.shape[1] != 2 or not len(timesteps) or np.any(timesteps[:, 1] >= timesteps[:, 0]):
        raise ValueError(f'pairs (t, s) have s < t, and there is at least one; not {timesteps.tolist()}')
    gaussian.require_signal(schedule, kind, timesteps)  # which also refuses levels that the schedule does not have
    return timesteps[:, 0], timesteps[:, 1]
