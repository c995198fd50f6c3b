"""How other codebases sample: which levels, what is clipped, which noise. Each as arguments of `sampler.sample`."""

import math

import numpy as np

from diffusion.schedule import timesteps

MODES = ('', 'diffusers', 'diffusers-ddim', 'ddim', 'ho')


def resolve(compat, T, *, num_steps, spacing, eta, variance, clip):
    """What `sampler.sample` is to do, and the spacing, where a codebase is to be followed.

        ''                what is asked
        'ho'              Ho et al.'s code for CIFAR-10: all T levels, η = 1, σ² = β, x̂_0 clipped
        'ddim'            the DDIM authors' code: spacing 'quad', or 'uniform' where another is asked, in as many
                          steps as come out of it (`timesteps` with exact=False); variance 'small', x̂_0 not clipped;
                          but clipped with variance 'large' and η = 1 (its ddpm_noisy, the paper's σ̂)
        'diffusers'       its DDPMScheduler where η = 1, else its DDIMScheduler; spacing 'leading' where neither
                          'trailing' nor 'linspace' is asked
        'diffusers-ddim'  its DDIMScheduler, for any η

    What a mode fixes takes the place of what is asked; the rest is as asked.

    Where the DDIM code visits a level twice in a row, the second visit changes nothing (β = 0, so σ = 0 and
    x_s = x_t), and it is left out. diffusers' DDIMScheduler goes from each level t to t − ⌊T/S⌋, wherever it
    is evaluated next: the pairs do not meet where S does not divide T, or the spacing is 'linspace'. It clips
    x̂_0 and leaves ε̂ as it is, and has the variance 'small' alone. Its DDPMScheduler adds noise on the last
    step of 'trailing' chains shorter than T.

    Returns {'timesteps', 'eta', 'variance', 'clip', 'last_noise', 'spacing', 'num_steps'}.
    Raises ValueError for another mode, for a number of 'trailing' steps of which diffusers takes one too
    many, from level 0, and for what `timesteps` refuses.
    """
    if compat not in MODES:
        raise ValueError(f'compat is {compat!r}, but must be one of {", ".join(map(repr, MODES))}')
    exact, last_noise = True, False
    if compat == 'ho':
        num_steps, spacing, eta, variance, clip = T, 'trailing', 1.0, 'large', True
    elif compat == 'ddim':
        spacing = 'quad' if spacing == 'quad' else 'uniform'
        exact = False
        clip = variance == 'large' and eta == 1
        variance = 'large' if clip else 'small'
    elif compat:
        spacing = spacing if spacing in ('trailing', 'linspace') else 'leading'
    levels = timesteps(T, num_steps, spacing, exact=exact)
    if compat.startswith('diffusers'):
        if spacing == 'trailing' and math.ceil(T / (T / num_steps)) > num_steps:
            raise ValueError(
                f"compat {compat!r}: of {num_steps} 'trailing' steps diffusers takes one more, from timestep −1, "
                'which is no noise level; ask for another number'
            )
        if eta == 1 and compat == 'diffusers':
            last_noise = variance == 'large' and bool(levels[-2] > 1)
        else:
            levels = np.stack([levels[:-1], np.maximum(levels[:-1] - T // num_steps, 0)], axis=1)
            variance, clip = 'small', 'x0-only' if clip else False
    return {
        'timesteps': levels,
        'eta': eta,
        'variance': variance,
        'clip': clip,
        'last_noise': last_noise,
        'spacing': spacing,
        'num_steps': len(levels) - (levels.ndim == 1),
    }
