"""The sampler: one loop over (t, s) pairs around one kernel, from DDPM (η = 1) to DDIM (η = 0)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import gaussian


def sample(keys, schedule, net, *, shape, timesteps, kind, eta, variance='small', clip=True, x_T=None):
    """Draw images: x_T ~ N(0, I), then x_s = mean + std·z for each pair (t, s) of `timesteps`.

    mean and std are `gaussian.posterior` of what the network predicts. `variance` may replace std:

        'small'              σ of DDIM Eq. 16: the η family, DDPM's β̃ at η = 1
        'large'              √(1 − ᾱ_t/ᾱ_s): DDPM's σ² = β, the DDIM paper's σ̂
        array (num_steps,)   these variances, one a pair, first pair first

    No noise is added at s = 0, whatever the variance. With η = 0 and 'small' the program draws no noise
    but x_T. Image i depends on keys[i] alone: level s draws from fold_in(keys[i], s).

    keys: (N,) typed PRNG keys; net: (x_t (N, *shape), t (N,)) → (N, *shape), its output of `kind`;
    shape: of one image; timesteps: (num_steps+1,) levels, decreasing to 0 (`schedule.timesteps`);
    eta: Python float in [0, 1]; clip: x̂_0 to [−1, 1] at each step; x_T: (N, *shape), drawn if None.
    Returns x_0 (N, *shape) float32.
    Raises ValueError for levels that do not decrease to 0 or leave the schedule, for another variance,
    for 'large' with eta = 0 (DDIM adds no noise), and for kind 'eps' from a level where ᾱ is 0.
    """
    levels = np.asarray(timesteps)
    if levels.ndim != 1 or len(levels) < 2 or levels[-1] != 0 or np.any(np.diff(levels) >= 0):
        raise ValueError(f'timesteps must decrease to 0 through at least one level, not {levels}')
    gaussian.require_signal(schedule, kind, levels[0])
    t, s = jnp.asarray(levels[:-1]), jnp.asarray(levels[1:])
    std = _own_std(schedule, s, t, variance=variance, eta=eta)
    stochastic = eta > 0 or std is not None

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
        x_T = noise(levels[0])
    x0, _ = jax.lax.scan(step, jnp.asarray(x_T, jnp.float32), (t, s, std))
    return x0


def _own_std(schedule, s, t, *, variance, eta):
    """The std (num_steps,) that replaces the kernel's, 0 at s = 0; None where the kernel's own serves."""
    if isinstance(variance, str):
        if variance == 'small':
            return None
        if variance != 'large':
            raise ValueError(f"variance is {variance!r}, but must be 'small', 'large' or an array")
        if eta == 0:
            raise ValueError("variance 'large' adds noise, and eta=0 (DDIM) has none; use eta=1 or variance 'small'")
        variance = schedule.beta(s, t)
    variance = jnp.asarray(variance, jnp.float32)
    if variance.shape != t.shape:
        raise ValueError(f'variance has shape {variance.shape}, but there are {len(t)} steps')
    return jnp.where(s > 0, jnp.sqrt(variance), 0)
