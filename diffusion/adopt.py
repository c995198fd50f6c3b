"""--mode=import: a workdir from another project's weights, which every other mode understands."""

import os

import jax

from diffusion import experiment
from diffusion.experiment import RunError
from diffusion.interop import ddim, diffusers, tensors
from diffusion.runtime.files import write_json


def run(config, workdir):
    """Write a checkpoint of step 0 and the config that goes with it. Returns the process's exit status.

    Network, schedule, kind and sampling are those of the files, where they say them, else of the config.
    A checkpoint without EMA weights gives its only ones to both.
    """
    for name in ('config.json', 'checkpoints'):
        if os.path.exists(os.path.join(workdir, name)):
            raise RunError(f'{workdir} holds a run already (there is {name}): choose another --workdir')
    source = config.interop.source
    with experiment.naming('config.interop.source'):
        found = read(source, image_size=config.data.image_size)
    config = config.copy_and_resolve_references()
    with experiment.naming('config.interop.source'):
        for part, values in found.settings.items():
            for key, value in values.items():
                try:
                    config[part][key] = value
                except TypeError as error:
                    raise ValueError(f'the files of {source} say that {part}.{key} is {value!r}: {error}') from error
    exp = experiment.build(config)
    expected = exp.abstract_state().params
    with experiment.naming('config.interop.source'):
        params = {
            name: tensors.take(
                weights, expected, found.names, f'{source} ({name})' if len(found.weights) > 1 else source
            )
            for name, weights in found.weights.items()
        }
    params, ema = params['params'], params.get('ema', params['params'])
    opt_state = jax.jit(exp.optimizer.init)(params)
    with experiment.hold(workdir), experiment.open_checkpoints(config, workdir, writing=True) as checkpoints:
        checkpoints.save(0, params=params, ema=ema, opt_state=opt_state)
    record = {
        'source': source,
        **found.facts,
        'settings': found.settings,
        'params_sha256': experiment.digest(params),
        'ema_sha256': experiment.digest(ema),
    }
    write_json(os.path.join(workdir, 'import.json'), record)
    experiment.remember_config(config, workdir)  # last: without it the workdir is no run

    shown = min(workdir, os.path.relpath(workdir), key=len)
    size = f'{config.data.image_size}×{config.data.image_size}×{config.data.channels}'
    print(
        f'{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters of {source}'
        f'{" and their EMA" if "ema" in found.weights else ""}, for images of {size}'
    )
    if 'schedule' not in found.settings:
        print('no scheduler is in the files: schedule, kind and sampling are those of the config')
    print(f'the other modes know it as: --config=configs/workdir.py:{shown} --workdir={shown}')
    return 0


def read(source, *, image_size):
    """What the files hold that `source` names, as PROJECT:PLACE. Raises ValueError where that is not possible."""
    project, _, place = source.partition(':')
    if not place or project not in ('diffusers', 'ddim'):
        raise ValueError(f"{source!r} should be 'diffusers:FOLDER', 'diffusers:HUB_ID' or 'ddim:FILE'")
    place = os.path.expanduser(place)
    return diffusers.read(place) if project == 'diffusers' else ddim.read(place, image_size=image_size)
