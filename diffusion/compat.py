"""How other codebases sample: levels, noise and clipping, as arguments of `sampler.sample`."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion.gaussian import Clip, require_room_for_noise
from diffusion.schedule import timesteps

Arguments = dict[str, Any]  # of `sampler.sample`; also 'spacing' and 'num_steps', for the record


def choose_variance(variance: str, eta: float, learned: bool = False) -> str:
    """Resolve 'auto': 'learned' or 'large' if η = 1, else 'small'. Other values are returned unchanged.

    Ho et al. sample CIFAR-10 with σ² = β, which is defined for η = 1 alone.

    Args:
        variance: 'auto', 'small', 'large' or 'learned'.
        eta: η, in [0, 1].
        learned: whether the model learns the variance.
    """
    at_1 = 'learned' if learned else 'large'
    return (at_1 if eta == 1 else 'small') if variance == 'auto' else variance


def as_asked(
    T: int, *, num_steps: int, spacing: str, eta: float, variance: str, clip: Clip, exact: bool = True
) -> Arguments:
    """Follow no codebase: use the arguments as they are. Arguments, result and errors as in `resolve`."""
    require_room_for_noise(variance, eta)
    levels = timesteps(T, num_steps, spacing, exact=exact)
    return {
        'timesteps': levels,
        'eta': eta,
        'variance': variance,
        'clip': clip,
        'last_noise': False,
        'spacing': spacing,
        'num_steps': len(levels) - 1,
    }


def ho(T: int, **asked: Any) -> Arguments:
    """Follow Ho et al.'s code for CIFAR-10: all T levels, η = 1, σ² = β, x̂_0 clipped. As in `resolve`."""
    return as_asked(T, num_steps=T, spacing='trailing', eta=1.0, variance='large', clip=True)


def ddim(T: int, *, num_steps: int, spacing: str, eta: float, variance: str, clip: Clip) -> Arguments:
    """Follow the DDIM authors' code. Arguments, result and errors as in `resolve`.

    Its spacing is 'quad', or 'uniform' instead of any other, with as many steps as the spacing gives (`timesteps` with
    exact=False). Where it visits a level twice in a row, the second visit changes nothing (β = 0, so σ = 0 and
    x_s = x_t) and is left out. Its variance is 'small', and it does not clip x̂_0. The exception is variance 'large'
    with η = 1 (`ddpm_noisy` in that code, σ̂ in the paper): then it clips.
    """
    noisy = variance == 'large' and eta == 1
    return as_asked(
        T,
        num_steps=num_steps,
        spacing='quad' if spacing == 'quad' else 'uniform',
        eta=eta,
        variance='large' if noisy else 'small',
        clip=noisy,
        exact=False,
    )


def diffusers_ddim(T: int, *, num_steps: int, spacing: str, eta: float, variance: str, clip: Clip) -> Arguments:
    """Follow diffusers' DDIMScheduler. Arguments, result and errors as in `resolve`.

    It steps from each level t to t − ⌊T/S⌋, where S is the number of steps, and evaluates the network at the next level
    of the spacing, which is another one if S does not divide T or the spacing is 'linspace'. Its variance is always
    'small'. When it clips x̂_0, it keeps ε̂.
    """
    arguments = _diffusers(T, num_steps=num_steps, spacing=spacing, eta=eta, variance='small', clip=clip)
    t = arguments['timesteps'][:-1]
    pairs = np.stack([t, np.maximum(t - T // num_steps, 0)], axis=1)
    return arguments | {'timesteps': pairs, 'clip': 'x0-only' if clip else False}


def diffusers(T: int, *, num_steps: int, spacing: str, eta: float, variance: str, clip: Clip) -> Arguments:
    """Follow diffusers' DDPMScheduler if η = 1, else its DDIMScheduler. Arguments, result and errors as in `resolve`.

    With variance 'large', its DDPMScheduler also adds noise at the last step if that step starts above level 1. With
    variance 'learned' it would take β̃ = 10⁻²⁰ there, which is refused.
    """
    asked: Arguments = dict(num_steps=num_steps, spacing=spacing, eta=eta, variance=variance, clip=clip)
    if eta != 1:
        return diffusers_ddim(T, **asked)
    arguments = _diffusers(T, **asked)
    if variance == 'learned' and arguments['timesteps'][-2] > 1:
        raise ValueError(
            f"with variance 'learned' and spacing {arguments['spacing']!r}, diffusers adds noise at the last step, "
            "with σ² between 10⁻²⁰ and β; use spacing 'leading', variance 'small', or compat=''"
        )
    return arguments | {'last_noise': variance == 'large' and bool(arguments['timesteps'][-2] > 1)}


def _diffusers(T: int, *, num_steps: int, spacing: str, **asked: Any) -> Arguments:
    """What diffusers' schedulers share: their spacings, and the numbers of steps that they cannot run."""
    spacing = spacing if spacing in ('trailing', 'linspace') else 'leading'
    arguments = as_asked(T, num_steps=num_steps, spacing=spacing, **asked)
    if spacing == 'trailing' and math.ceil(T / (T / num_steps)) > num_steps:
        raise ValueError(
            f"diffusers takes one more than the {num_steps} 'trailing' steps asked for, from timestep −1, "
            'which is not a noise level; ask for another number'
        )
    return arguments


COMPAT: dict[str, Callable[..., Arguments]] = {
    '': as_asked,
    'diffusers': diffusers,
    'diffusers-ddim': diffusers_ddim,
    'ddim': ddim,
    'ho': ho,
}


def resolve(
    compat: str,
    T: int,
    *,
    num_steps: int,
    spacing: str,
    eta: float,
    variance: str,
    clip: Clip,
    learned: bool = False,
) -> Arguments:
    """Choose the arguments of `sampler.sample` that reproduce a codebase.

    A value that the codebase fixes replaces the argument; the other arguments are kept.

    Args:
        compat: a key of `COMPAT`: which codebase to follow; '' for none.
        T: the number of noise levels of the schedule.
        num_steps: the number of steps, 1 to T.
        spacing: a key of `schedule.SPACINGS`.
        eta: η, in [0, 1].
        variance: 'small', 'large', 'learned' or 'auto', see `choose_variance`.
        clip: whether and how x̂_0 is clipped, see `gaussian.predict`.
        learned: whether the model learns the variance.

    Returns:
        The arguments 'timesteps', 'eta', 'variance', 'clip' and 'last_noise' of `sampler.sample`, and the 'spacing' and
        'num_steps' that they come from.

    Raises:
        ValueError: the codebase is unknown; `schedule.timesteps` refuses its arguments; the variance is 'large' or
            'learned' and η is not 1; or the codebase would take a step from a level that does not exist.
    """
    if compat not in COMPAT:
        raise ValueError(f'compat is {compat!r}, but must be one of {", ".join(map(repr, COMPAT))}')
    variance = choose_variance(variance, eta, learned)
    return COMPAT[compat](T, num_steps=num_steps, spacing=spacing, eta=eta, variance=variance, clip=clip)
