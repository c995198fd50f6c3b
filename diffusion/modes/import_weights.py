"""--mode=import_weights: a workdir from another project's weights, which every other mode accepts."""

import contextlib
import inspect
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import build, schedule, workdir
from diffusion.build import TrainState
from diffusion.interop import READERS
from diffusion.interop.tensors import Found, to_params
from diffusion.runtime import hosts, mesh
from diffusion.util import RunError, first_line, naming, say, write_json


def run(config: ConfigDict, path: str) -> int:
    """Write a checkpoint of step 0 and the config that belongs to it.

    Network, schedule, kind and sampling are those of the files where they state them, else those of the config. If
    the files have no EMA weights, their only weights serve as both.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        The exit status, 0.

    Raises:
        RunError: the files cannot be read, hold something else, or the workdir holds a run.
    """
    # Resolve.
    occupied = reason_occupied(path)
    if hosts.any_host(bool(occupied)):  # all hosts have looked before any of them writes
        raise RunError(occupied or f'another host found that {path} holds a run already')
    workdir.check(config)
    source = config.interop.source
    with naming('config.interop.source'):
        found = read(source, config)
        given = config.command.overrides
        config, settings = merge(config, found, source)
    asked = config.copy_and_resolve_references()
    asked.command.overrides = given  # so that no warning is about a key that only the files state
    with naming_files(source, settings):
        exp = build.build(asked)

    # Compute.
    abstract = exp.abstract_state()
    with naming('config.interop.source'):
        weights = take_weights(found, abstract.params, source)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = weights['params']
    state = jax.jit(exp.start, out_shardings=shardings)(params, weights.get('ema', params))

    # Record.
    record = {
        'source': source,
        **found.facts,
        'settings': settings,
        'signal_at_T': float(exp.schedule.signal(exp.schedule.T)),  # √ᾱ_T, 0 for pure noise
        'params_sha256': workdir.digest(state.params),
        'ema_sha256': workdir.digest(state.ema),
    }
    with workdir.lock(path):
        begin(path, record)
        save(config, path, state)
        workdir.write_config(config, path)  # last: without it the workdir is not a run

    # Report.
    shown = min(path, os.path.relpath(path), key=len)
    size = f'{config.data.image_size}×{config.data.image_size}×{config.data.channels}'
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f'{count:,} parameters of {source}{" and their EMA" if "ema" in weights else ""}, for images of {size}')
    if 'schedule' not in found.settings:
        chain = f'schedule {config.schedule.name!r} with T={config.schedule.T}, kind {config.model.kind!r}'
        say(f'the files do not say how the network was trained, so that is as in the config: {chain}, and the sampling')
    say(f'the other modes use it with: --workdir={shown}')
    return 0


def read(source: str, config: ConfigDict) -> Found:
    """Read the files that `source` names, as PROJECT:PLACE; config has what they do not say.

    Raises:
        ValueError: the project is unknown, or the files cannot be read.
    """
    project, _, place = source.partition(':')
    if not place or project not in READERS:
        raise ValueError(
            f"{source!r} must be PROJECT:PLACE, as 'diffusers:FOLDER', 'diffusers:HUB_ID', 'openai:FILE' or "
            f"'ddim:FILE'; "
            f'PROJECT is one of {", ".join(READERS)}'
        )
    given = {**config.model, **config.interop, 'image_size': config.data.image_size}
    keys = given.keys() & inspect.signature(READERS[project]).parameters
    return READERS[project](os.path.expanduser(place), **{key: given[key] for key in keys})


def take_weights(found: Found, expected: Any, source: str) -> dict[str, Any]:
    """Return {'params' and perhaps 'ema': our tree on the devices} of the weights found.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite.
    """
    several = len(found.weights) > 1
    taken = {
        name: to_params(weights, expected, found.names, f'{source} ({name})' if several else source)
        for name, weights in found.weights.items()
    }
    return {
        name: jax.tree.map(lambda array, leaf: mesh.put_whole(array, leaf.sharding), tree, expected)
        for name, tree in taken.items()
    }


def merge(config: ConfigDict, found: Found, source: str) -> tuple[ConfigDict, dict[str, dict[str, Any]]]:
    """Return the config with the settings of the files, and those settings.

    Keys of sampling on the command line are kept. Keys of the network or its training must agree with the files.

    Raises:
        ValueError: a setting has a value or type that the config does not accept, or other than the command line's.
    """
    config = config.copy_and_resolve_references()
    settings = dict(found.settings)
    if settings['model'].get('num_classes'):
        # Their networks know no "no class": that row of ours is zeros, and no training has used it.
        settings |= {'data': settings['data'] | {'labels': True}, 'train': {'label_dropout': 0.0}}
    elif config.data.labels:
        raise ValueError(
            f'config.data.labels is True, but the network of {source} is unconditional: use data.labels=False'
        )
    if 'sample' in settings:
        given = config.command.overrides
        settings['sample'] = {k: value for k, value in settings['sample'].items() if f'sample.{k}' not in given}
    set_keys(config, settings, source)
    with naming_files(source, settings):
        workdir.check(config)
    if found.betas is not None:
        named = {'schedule': settings['schedule'] | named_schedule(found.betas, config.schedule, source)}
        set_keys(config, named, source)
        settings |= named
    theirs = [f'{part}.{key}' for part, values in settings.items() for key in values]
    config.command.overrides = tuple(
        sorted({*config.command.overrides, *theirs})
    )  # later commands need not repeat them
    return config, settings


def set_keys(config: ConfigDict, settings: dict[str, dict[str, Any]], source: str) -> None:
    """Set the keys of {part of the config: {key: value}}.

    Raises:
        ValueError: a value is of another type, or not what the command line says.
    """
    for part, values in settings.items():
        for key, value in values.items():
            asked = config[part][key]
            if f'{part}.{key}' in config.command.overrides and asked != value:
                raise ValueError(
                    f'config.{part}.{key} is {asked!r}, but the files of {source} say {value!r}: leave the key out'
                )
            try:
                config[part][key] = value
            except TypeError as error:
                raise ValueError(f'the files of {source} say that {part}.{key} is {value!r}: {error}') from error


def named_schedule(betas: list[float], config: ConfigDict, source: str) -> dict[str, Any]:
    """Return the keys of config.schedule with which one of our schedules has these β_1 … β_T.

    β_1 and β_T are tried as beta_start and beta_end, since files that list betas need not state these.

    Raises:
        ValueError: none has them.
    """
    try:
        found = schedule.from_betas(betas)
        found = schedule.with_zero_terminal_snr(found) if config.zero_terminal_snr else found
    except ValueError as error:
        raise ValueError(f'{source}: trained_betas: {error}') from error
    theirs = np.asarray(found.log_alpha_bar)
    stated, last = (config.beta_start, config.beta_end), betas[-1]
    for start, end in (stated, (stated[0], last), (betas[0], last)):
        for name in schedule.SCHEDULES:
            keys = {'name': name, 'beta_start': float(start), 'beta_end': float(end)}
            asked = config.copy_and_resolve_references()
            asked.update(keys)
            try:
                ours = np.asarray(build.make_schedule(asked).log_alpha_bar)
            except ValueError:  # the schedule of this name does not exist for these two numbers
                continue
            if np.allclose(ours, theirs, rtol=1e-5, atol=0):  # files may have rounded betas to float32
                return keys
    raise ValueError(
        f'{source}: trained_betas, {len(betas)} from {betas[0]:g} to {betas[-1]:g}, belong to none of our schedules '
        f'({", ".join(schedule.SCHEDULES)}; cosine with config.schedule.offset={config.offset:g} and '
        f'max_beta={config.max_beta:g})'
    )


def reason_occupied(path: str) -> str:
    """Return why nothing can be imported to a workdir, or ''. An unfinished import is no reason.

    An unfinished import has import.json, which is written first, no config.json, which is written last, and no
    checkpoint but that of step 0.
    """
    checkpoints = os.path.join(path, 'checkpoints')
    steps = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    unfinished = os.path.exists(os.path.join(path, 'import.json')) and all(
        name.partition('.')[0] == '0' for name in steps
    )
    for name, there in (
        ('config.json', os.path.exists(os.path.join(path, 'config.json'))),
        ('checkpoints', os.path.exists(checkpoints) and not unfinished),
    ):
        if there:
            return f'{path} holds a run already (it has {name}): choose another --workdir'
    return ''


def begin(path: str, record: dict[str, Any]) -> None:
    """Write import.json in place of what an unfinished import left; all hosts wait for the first."""
    if hosts.is_first():
        if occupied := reason_occupied(path):  # since the first look
            raise RunError(occupied)
        shutil.rmtree(os.path.join(path, 'checkpoints'), ignore_errors=True)
        write_json(os.path.join(path, 'import.json'), record)
    hosts.any_host(False)


def save(config: ConfigDict, path: str, state: TrainState) -> None:
    """Write the checkpoint of step 0.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with workdir.open_checkpoints(config, path, writing=True) as checkpoints:
            checkpoints.save(0, workdir.plain(config), **state.trees())
            checkpoints.wait()
    except (OSError, ValueError) as error:
        raise RunError(
            f'{path}/checkpoints could not be written ({first_line(error)}); afterwards the same command tries again'
        ) from error


@contextlib.contextmanager
def naming_files(source: str, settings: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Name the files in a RunError within the context that is about a part of the config they determine."""
    try:
        yield
    except RunError as error:
        if str(error).startswith(tuple(f'config.{part}' for part in settings)):
            raise RunError(f'config.interop.source: with the settings of {source}: {error}') from error
        raise
