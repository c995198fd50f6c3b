"""--mode=import: a workdir from another project's weights, which every other mode understands."""

import contextlib
import os
import shutil

import jax
import numpy as np

from diffusion import experiment, schedule
from diffusion.experiment import RunError
from diffusion.interop import ddim, diffusers, tensors
from diffusion.runtime import mesh as meshes
from diffusion.runtime.errors import first_line
from diffusion.runtime.files import write_json


def run(config, workdir):
    """Write a checkpoint of step 0 and the config that goes with it. Returns the process's exit status.

    Network, schedule, kind and sampling are those of the files, where they say them, else of the config.
    A checkpoint without EMA weights gives its only ones to both.
    """
    taken = held_run(workdir)
    if meshes.any_host(taken):  # all hosts have looked before any of them writes
        raise RunError(taken or f'another host says that {workdir} holds a run already')
    experiment.check(config)
    source = config.interop.source
    with experiment.naming('config.interop.source'):
        found = read(source, image_size=config.data.image_size)
        config, settings = merge(config, found, source)
    with of_files(source, settings):
        exp = experiment.build(config)
    state = exp.abstract_state()
    with experiment.naming('config.interop.source'):
        params = {
            name: tensors.take(
                weights, state.params, found.names, f'{source} ({name})' if len(found.weights) > 1 else source
            )
            for name, weights in found.weights.items()
        }
    params = {name: put(tree, state.params) for name, tree in params.items()}
    params, ema = params['params'], params.get('ema', params['params'])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    opt_state = jax.jit(exp.optimizer.init, out_shardings=shardings)(params)
    record = {
        'source': source,
        **found.facts,
        'settings': settings,
        'params_sha256': experiment.digest(params),
        'ema_sha256': experiment.digest(ema),
    }
    with experiment.hold(workdir):
        begin(workdir, record)
        save(config, workdir, params=params, ema=ema, opt_state=opt_state)
        experiment.remember_config(config, workdir)  # last: without it the workdir is no run
    if not meshes.is_first():
        return 0

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


def held_run(workdir):
    """Why nothing can be imported to `workdir`, or ''. An import that came to no end is no reason.

    That one has import.json, which comes first, no config.json, which comes last, and no checkpoint but of step 0.
    """
    checkpoints = os.path.join(workdir, 'checkpoints')
    steps = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    unfinished = os.path.exists(os.path.join(workdir, 'import.json')) and all(
        name.partition('.')[0] == '0' for name in steps
    )
    for name, there in (
        ('config.json', os.path.exists(os.path.join(workdir, 'config.json'))),
        ('checkpoints', os.path.exists(checkpoints) and not unfinished),
    ):
        if there:
            return f'{workdir} holds a run already (there is {name}): choose another --workdir'
    return ''


def begin(workdir, record):
    """Write import.json, in the place of what an import without an end has left; all hosts wait for the first."""
    if meshes.is_first():
        if taken := held_run(workdir):  # since it was asked first
            raise RunError(taken)
        shutil.rmtree(os.path.join(workdir, 'checkpoints'), ignore_errors=True)
        write_json(os.path.join(workdir, 'import.json'), record)
    meshes.any_host(False)


def save(config, workdir, **trees):
    """Write the checkpoint of step 0. Raises RunError where that cannot be done."""
    try:
        with experiment.open_checkpoints(config, workdir, writing=True) as checkpoints:
            checkpoints.save(0, **trees)
            checkpoints.wait()
    except (OSError, ValueError) as error:
        raise RunError(
            f'{workdir}/checkpoints could not be written ({first_line(error)}); then the same command tries again'
        ) from error


def put(tree, expected):
    """Arrays that every host has, on the devices as `expected`, of ShapeDtypeStructs, has them."""
    return jax.tree.map(lambda array, leaf: meshes.put_whole(array, leaf.sharding), tree, expected)


def read(source, *, image_size):
    """What the files hold that `source` names, as PROJECT:PLACE. Raises ValueError where that is not possible."""
    project, _, place = source.partition(':')
    if not place or project not in ('diffusers', 'ddim'):
        raise ValueError(f"{source!r} should be 'diffusers:FOLDER', 'diffusers:HUB_ID' or 'ddim:FILE'")
    place = os.path.expanduser(place)
    return diffusers.read(place) if project == 'diffusers' else ddim.read(place, image_size=image_size)


def merge(config, found, source):
    """(config, settings): the config with the settings that the files have, and those. Raises ValueError."""
    config = config.copy_and_resolve_references()
    settings = dict(found.settings)
    set_keys(config, settings, source)
    with of_files(source, settings):
        experiment.check(config)
    if found.betas is not None:
        named = {'schedule': settings['schedule'] | named_schedule(found.betas, config.schedule, source)}
        set_keys(config, named, source)
        settings |= named
    return config, settings


@contextlib.contextmanager
def of_files(source, settings):
    """Have a RunError within name the files too, where it is about a part of the config that is theirs."""
    try:
        yield
    except RunError as error:
        if str(error).startswith(tuple(f'config.{part}' for part in settings)):
            raise RunError(f'config.interop.source: with the settings of {source}: {error}') from error
        raise


def set_keys(config, settings, source):
    """Set the keys of {part of the config: {key: value}}. Raises ValueError for a value of another type."""
    for part, values in settings.items():
        for key, value in values.items():
            try:
                config[part][key] = value
            except TypeError as error:
                raise ValueError(f'the files of {source} say that {part}.{key} is {value!r}: {error}') from error


def named_schedule(betas, config, source):
    """The keys of config.schedule with which one of our schedules has these β_1 … β_T. Raises ValueError for none.

    β_1 and β_T are tried in the place of beta_start and beta_end, as files that list betas need not say these.
    """
    try:
        theirs = np.asarray(schedule.from_betas(betas).log_alpha_bar)
    except ValueError as error:
        raise ValueError(f'{source}: trained_betas: {error}') from error
    stated, last = (config.beta_start, config.beta_end), betas[-1]
    for start, end in (stated, (stated[0], last), (betas[0], last)):
        for name in schedule.SCHEDULES:
            keys = {'name': name, 'beta_start': float(start), 'beta_end': float(end)}
            asked = config.copy_and_resolve_references()
            asked.update(keys)
            try:
                ours = np.asarray(experiment.make_schedule(asked).log_alpha_bar)
            except ValueError:  # these two numbers are none for a schedule of that name
                continue
            if np.allclose(ours, theirs, rtol=1e-5, atol=0):  # of betas that were rounded to float32
                return keys
    raise ValueError(
        f'{source}: trained_betas, {len(betas)} from {betas[0]:g} to {betas[-1]:g}, are none of our schedules '
        f'({", ".join(schedule.SCHEDULES)}; cosine with config.schedule.offset={config.offset:g} and '
        f'max_beta={config.max_beta:g})'
    )
