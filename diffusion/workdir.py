"""What a run keeps on disk, and how it is checked: config.json, the lock, checkpoints, output folders.

workdir/
  config.json          what was asked, and which images it was trained on
  checkpoints/<step>/  written by Orbax; each holds a copy of config.json
  saved.json           the step of the checkpoint that was saved last, by which it is noticed if all are gone
  logs/  samples/  likelihood/  data/  export/
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import autoconfig, data, limits
from diffusion.configs import default
from diffusion.data.sources import SOURCES
from diffusion.runtime import hosts, interrupt, mesh
from diffusion.runtime.checkpoints import Checkpoints, DamagedError, OtherArraysError, newest_record
from diffusion.runtime.compilation import cache_programs, private_folder
from diffusion.runtime.logs import last_step
from diffusion.util import FileLock, RunError, cache_folder, first_line, read_json, say, write_json

# A run keeps its data, network and schedule; where the images lie, how they are read, the precision, and what one
# command is allowed may change.
IDENTITY = ('data', 'model', 'schedule')
INCIDENTAL = (
    'source',
    'split',
    'data_dir',
    'cache',
    'cache_dir',
    'placement',
    'max_bad_fraction',
    'max_pixels',
    'implementation',
    'dtype',
    'remat',
    'begin_again',
    'accept_other_images',
)
INTERVALS = ('num_steps', 'checkpoint_every', 'keep_checkpoints', 'log_every', 'sample_every')  # change no parameter

# In a run from before a key existed, the key has its default, or else the value given here.
BEFORE: dict[str, dict[str, Any]] = {'data': {'shards': 1}}

# The types of what is read from a config.json, and from its record of the images.
STORED = {
    'data': dict,
    'model': dict,
    'schedule': dict,
    'train': dict,
    'images': dict,
    'changes': list,
    'command': dict,
}
STORED_COMMAND = {'config': str, 'overrides': list}
STORED_IMAGES = {'count': int, 'fingerprint': str, 'sha256': str, 'channel_means': list}


def resolve(config: ConfigDict, workdir: str, *, training: bool = False, platform: str | None = None) -> ConfigDict:
    """Check the config's values and fill in what it leaves to the run in `workdir`, or else to the pictures.

    A run was made by a config and the keys that its command line changed. Modes that read it need not be given these
    keys again: those of data, network and schedule that this command line does not change are the run's.

    Args:
        config: the config of the command.
        workdir: the folder of the run.
        training: only what the config leaves open is taken from the run; everything else must be asked for again.
        platform: of the devices that the network is for; None is that of this process.

    Raises:
        RunError: a key has a value that it may not have, config.json is damaged, or no picture can be decoded.
    """
    config = config.copy_and_resolve_references()
    stored = read_config(workdir)
    check(config, stored)
    if stored:
        try:
            if not training:
                config.update_from_flattened_dict(_changed_by_its_command(stored, config))
            if not config.data.image_size:
                allowed = stored['data'].get('max_bad_fraction', 0.0)  # chosen with the image size
                config.data.max_bad_fraction = max(config.data.max_bad_fraction, allowed)
            for key in ('image_size', 'channels', 'shards'):
                config.data[key] = config.data[key] or (BEFORE['data'] | stored.get('data', {}))[key]
            if not config.model.channels:
                config.model.update({key: stored['model'][key] for key in autoconfig.CHOSEN})
            if config.data.labels and not config.model.num_classes:
                config.model.num_classes = stored['model'].get('num_classes', 0)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(workdir, f'{type(error).__name__}: {error}') from error
        check(config, stored)
    return config if autoconfig.is_complete(config) else autoconfig.complete(config, platform)


def config_of_run(config: ConfigDict, workdir: str) -> ConfigDict:
    """Return a config with the data, network and schedule of another run; the rest is that of this command.

    Raises:
        ValueError: there is no such run, or it has keys that this config has not.
    """
    stored = read_config(workdir)
    if stored is None:
        raise ValueError(f'there is no run in {workdir}')
    theirs, defaults = config.copy_and_resolve_references(), default.get_config()
    for part in IDENTITY:
        found = defaults[part].to_dict() | stored.get(part, {})
        others = [key for key in found if key not in theirs[part]]
        if others:
            raise ValueError(f'config.{part}.{others[0]} of that run is unknown here: give a --config that has it')
        theirs[part].update({key: value for key, value in found.items() if key not in INCIDENTAL})
    check(theirs, stored)
    return theirs


def _changed_by_its_command(stored: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """{key: value} of what the command line of a run changed and this one leaves to the run."""
    changed = {}
    for key in stored.get('command', {}).get('overrides', ()):
        part, _, name = key.partition('.')
        known = part in IDENTITY and name in config[part] and name in stored.get(part, {})
        if known and key not in config.command.overrides:
            changed[key] = stored[part][name]
    return changed


def check(config: ConfigDict, stored: dict[str, Any] | None = None) -> None:
    """Raise RunError, which names the key, for a value that the key may not have.

    Args:
        config: the config of the command.
        stored: the config of the run, if there is one: its own config file may add entries that are missing here.
    """
    try:
        limits.check(config)
        source = config.data.source
        if stored and source.partition(':')[0] not in SOURCES:
            raise ValueError(f'config.data.source is {source!r}, but must begin with one of {", ".join(SOURCES)}')
    except ValueError as error:
        made_with = (stored or {}).get('command', {}).get('config', '')
        if not made_with.endswith('.py') or config.command.config == made_with:
            raise RunError(str(error)) from error
        raise RunError(f'{error}. The run was made with a config that may add it: give --config={made_with}') from error


def read_config(workdir: str) -> dict[str, Any] | None:
    """Return what config.json holds; if it is missing, the copy in the newest checkpoint; None if there is none.

    Raises:
        RunError: config.json is damaged.
    """
    try:
        stored = read_json(os.path.join(workdir, 'config.json'))
        _require_config(stored)
    except FileNotFoundError:
        return saved_record(workdir)
    except (OSError, ValueError) as error:
        raise _unreadable(workdir, error) from error
    return stored


def saved_record(workdir: str) -> dict[str, Any] | None:
    """Return the copy of config.json in the newest checkpoint, or None if there is none."""
    record = newest_record(os.path.join(workdir, 'checkpoints'))
    with contextlib.suppress(ValueError):
        _require_config(record)
        return record if 'model' in record else None
    return None


def check_config(config: ConfigDict, workdir: str, images: data.Images | None = None) -> None:
    """Check that `workdir` holds no run of another network, schedule or data.

    Args:
        config: the resolved config of the command.
        workdir: the folder of the run.
        images: the training images; if given, they must be those that the run was trained on.

    Raises:
        RunError: it does; the message lists the differences.
    """
    stored = read_config(workdir)
    if stored is None:
        return
    differences = _differences(config, stored)
    if differences:
        raise RunError(_another_run(f'{workdir} holds another run', differences, workdir))
    trained_on = stored.get('images', {})
    if images is not None and _are_others(images, trained_on) and not config.train.accept_other_images:
        here, detail = images.record, ''
        if (trained_on['count'], trained_on['fingerprint']) == (here['count'], here['fingerprint']):
            detail = (
                f'        as many, but with SHA-256 {trained_on["sha256"][:12]}… there, {here["sha256"][:12]}… here: '
                'a picture was replaced, or renamed (the order is that of the names)\n'
            )
            if trained_on['sha256'] == here['sha256']:
                detail = '        the same images, but in other classes\n'
        raise RunError(
            f'{workdir} holds a run on other images:\n'
            f'    the images: {trained_on["count"]}, preprocessing {trained_on["fingerprint"]} there; '
            f'{here["count"]}, preprocessing {here["fingerprint"]} in {config.data.source}\n{detail}'
            'Give it the same images, train on with these from here on by --config.train.accept_other_images=True, or '
            'choose another --workdir.'
        )


def require_same_run(config: ConfigDict, workdir: str) -> Callable[[int, dict[str, Any]], None]:
    """Return a function that raises RunError for a checkpoint of another network, schedule or data.

    It takes the step of the checkpoint and the record that was saved with it, as `Checkpoints.restore` passes them.
    """

    def accept(step: int, record: dict[str, Any]) -> None:
        path = os.path.join(workdir, 'checkpoints', str(step))
        try:
            _require_config(record)
        except ValueError as error:
            raise DamagedError(f'{path} is damaged (its record: {error})') from error
        differences = _differences(config, record) if 'model' in record else ()
        if differences:
            raise RunError(_another_run(f'{path} was saved by another run', differences, workdir))

    return accept


def write_config(config: ConfigDict, workdir: str, images: data.Images | None = None, step: int = 0) -> dict[str, Any]:
    """Write config.json, against which later commands are checked.

    If `workdir` has one already, settings of training that differ from `step` on are printed and recorded in it.

    Args:
        config: the resolved config of the command.
        workdir: the folder of the run.
        images: the training images, if there are any.
        step: the number of training steps that the run has done.

    Returns:
        What config.json holds now; each checkpoint keeps a copy.

    Raises:
        RunError: the file cannot be written.
    """
    stored, asked = read_config(workdir) or {}, plain(config)
    if stored and not config.command.config:
        asked['command'] = {
            'config': stored.get('command', {}).get('config', ''),
            'overrides': sorted({*stored.get('command', {}).get('overrides', ()), *config.command.overrides}),
        }
    changes = stored.get('changes', []) if step else []
    if stored and step:
        before, now = ({'seed': c.get('seed')} | c.get('train', {}) for c in (stored, asked))
        for key in now:
            if key in INCIDENTAL or before.get(key) == now[key]:
                continue
            name = 'config.seed' if key == 'seed' else f'config.train.{key}'
            changes.append({'step': step, 'key': name, 'before': before.get(key), 'after': now[key]})
            if key not in INTERVALS:
                say(f'{name} is {now[key]!r} from step {step} on; it was {before.get(key)!r}')
    if images is not None:
        asked['images'] = images.record
        if step and _are_others(images, stored.get('images', {})):
            before, after = stored['images'], images.record
            changes.append({'step': step, 'key': 'the images', 'before': before, 'after': after})
            say(f'trained on {after["count"]} other images from step {step} on; there were {before["count"]}')
    asked |= {'changes': changes} if changes else {}
    if hosts.is_first():
        with writing(workdir):
            write_json(os.path.join(workdir, 'config.json'), asked)
    return asked


def _are_others(images, trained_on):
    """Whether images, or their labels, are not those that a run records, if it does."""
    return bool(trained_on) and any(trained_on.get(k) != images.record.get(k) for k in ('sha256', 'labels_sha256'))


def _another_run(found, differences, workdir):
    return '\n'.join(
        [
            f'{found}:',
            *differences,
            f'Ask for the same, as --workdir={workdir} without --config does, or choose another --workdir.',
        ]
    )


def _differences(config: ConfigDict, stored: dict[str, Any]) -> list[str]:
    """A line for each key in which a config differs from that of a run."""
    asked, defaults = plain(config), plain(default.get_config())
    lines = []
    for part in IDENTITY:
        # A run from before a key existed has the key's default, unless BEFORE says otherwise.
        before = {key: defaults[part].get(key) for key in asked[part]} | BEFORE.get(part, {}) | stored.get(part, {})
        lines += [
            f'    config.{part}.{key}: {before.get(key)!r} there, {asked[part].get(key)!r} asked'
            for key in sorted(asked[part].keys() | before.keys())
            if not _agree(key, before.get(key), asked[part].get(key))
        ]
    return lines


def _agree(key: str, before: Any, asked: Any) -> bool:
    """Whether a run and a config agree in a key. If one of them leaves the number of shards open, they do."""
    return before == asked or key in INCIDENTAL or (key == 'shards' and 0 in (before, asked))


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a config as JSON gives it back, as config.json and checkpoints hold it."""
    return json.loads(json.dumps(config.to_dict()))


def _require_config(stored):
    """Raise ValueError unless `stored` is what a config.json may hold, as far as it is read."""
    _require_types(stored, {part: kind for part, kind in STORED.items() if isinstance(stored, dict) and part in stored})
    if 'command' in stored:
        _require_types(stored['command'], STORED_COMMAND)
        if not all(isinstance(key, str) for key in stored['command']['overrides']):
            raise ValueError('command.overrides are not names of keys')
    if 'images' in stored:
        _require_types(stored['images'], STORED_IMAGES)
        if not all(isinstance(mean, (int, float)) for mean in stored['images']['channel_means']):
            raise ValueError('channel_means are not numbers')


def _require_types(found, types):
    """Raise ValueError unless `found` is a dict with values of these types."""
    if not isinstance(found, dict):
        raise ValueError(f'{str(found)[:40]!r} is not an object with keys and values')
    for key, kind in types.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(f'{key} is {str(found.get(key))[:40]!r}, but must be a {kind.__name__}')


def _unreadable(workdir, why):
    path = os.path.join(workdir, 'config.json')
    copies = '. Checkpoints hold copies of it: if it is removed, the newest is used' * bool(saved_record(workdir))
    return RunError(f'{path} cannot be read ({why}): restore it, or choose another --workdir{copies}')


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[FileLock | None]:
    """Keep other processes from training in `workdir` within the context.

    Yields:
        The lock on the first host, None on the others.

    Raises:
        RunError: another process trains in it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(FileLock(os.path.join(workdir, '.lock'))) if hosts.is_first() else None
        except OSError as error:
            raise RunError(f'--workdir={workdir} cannot be used: {error}') from error
        yield held


@contextlib.contextmanager
def writing(folder: str, error_type: type[Exception] = OSError, *, key: str = '') -> Iterator[None]:
    """Turn an OSError, or an `error_type`, within the context into a RunError that names the folder.

    If a key of the config names the folder, the advice is to set it. A signal waits until the context ends.
    """
    try:
        with interrupt.finishing('file'):
            yield
    except (OSError, error_type) as error:
        other = f'another folder by --config.{key}=…, beside the same --workdir' if key else 'another --workdir'
        raise RunError(
            f'{folder} cannot be written ({first_line(error)}): free some space or repair it, or choose {other}'
        ) from error


def wrote(folder: str, *names: str) -> None:
    """Name files as they are complete; the last line of a command that is interrupted from now on says that they are.

    Args:
        folder: where they are.
        names: of the files.
    """
    for name in names:
        say(os.path.join(folder, name))
    interrupt.leaves('the files named above are complete; the same command computes the rest again')


def make_folder(*path: str, key: str = '') -> str:
    """Make a folder and check that it can be written, before anything is computed.

    Args:
        path: its parts.
        key: of the config, if one names the folder.

    Returns:
        The path.

    Raises:
        RunError: it cannot be made or written.
    """
    folder = os.path.join(*path)
    with writing(folder, key=key):
        if hosts.is_first():
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b'written')
    return folder


def output_folder(config: ConfigDict, workdir: str, part: str, kind: str, *name: str) -> str:
    """Make a folder in which a mode writes, and check that it can be written.

    Args:
        config: the key `folder` of its `part` names another one; a run that can only be read needs that.
        workdir: the folder of the run.
        part: of the config.
        kind: the folder in the workdir.
        name: of the folder below it.

    Raises:
        RunError: it cannot be made or written.
    """
    asked = os.path.abspath(os.path.expanduser(config[part].folder)) if config[part].folder else ''
    return make_folder(asked or os.path.join(workdir, kind), *name, key=f'{part}.folder')


def settings_for_record(asked: ConfigDict) -> dict[str, Any]:
    """Return a mode's part of the config without what says where it reads and writes."""
    hidden = ('folder', 'step', 'guide', 'guide_step')
    return {key: value for key, value in asked.to_dict().items() if key not in hidden}


def open_checkpoints(config: ConfigDict, workdir: str, *, writing: bool = False) -> Checkpoints:
    """Open the checkpoints of a run.

    Args:
        config: says how many are kept.
        workdir: the folder of the run.
        writing: for the one process that saves; the folder is made and checked.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = make_folder(workdir, 'checkpoints') if writing else os.path.join(workdir, 'checkpoints')

    def record_step(step):
        # The workdir may have been moved meanwhile, and a full disk is no reason to stop.
        if hosts.is_first() and os.path.isdir(os.path.join(folder, str(step))):
            with contextlib.suppress(OSError):
                write_json(_saved_json(workdir), {'step': int(step)})

    return Checkpoints(folder, keep=config.train.keep_checkpoints, writing=writing, written=record_step)


def last_saved(workdir: str) -> int | None:
    """Return the step of the checkpoint that was saved last, whether or not it is still there; None if none was."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(read_json(_saved_json(workdir))['step'])
    return None


def require_no_history(config: ConfigDict, workdir: str) -> None:
    """Raise RunError if a run whose checkpoints are all gone would begin again at step 0 without being asked to."""
    saved, logged = last_saved(workdir), last_step(os.path.join(workdir, 'logs'))
    train = (read_config(workdir) or {}).get('train', {})
    # A second checkpoint waits for the first, so a log that goes beyond it is that of a run that had one.
    if saved is None and logged <= 2 * train.get('checkpoint_every', logged):
        return
    lost = f'{workdir} holds a run whose log reaches step {logged}, but no checkpoint'
    if saved is not None:
        lost = f'{workdir} holds a run that was saved at step {saved}, but none of its checkpoints is left'
    if not config.train.begin_again:
        raise RunError(
            f'{lost}: restore checkpoints/ from a copy, choose another --workdir, or begin again at step 0, with new '
            'logs, by --config.train.begin_again=True'
        )
    say(f'{lost}: beginning again at step 0, as train.begin_again asks')


def _saved_json(workdir):
    return os.path.join(workdir, 'saved.json')


@contextlib.contextmanager
def intact() -> Iterator[None]:
    """Turn errors about checkpoints, all damaged or with other arrays, into a RunError."""
    try:
        yield
    except (DamagedError, OtherArraysError) as error:
        raise RunError(str(error)) from error


def load_params(abstract: Any, config: ConfigDict, workdir: str, weights: str, step: int = -1) -> tuple[int, Any]:
    """Read parameters from a checkpoint.

    Args:
        abstract: shapes and shardings of a TrainState, as `Experiment.abstract_state` gives them.
        config: the resolved config of the command.
        workdir: the folder of the run.
        weights: 'ema' or 'raw'.
        step: of the checkpoint; −1 is the newest that is intact.

    Returns:
        (step, params).

    Raises:
        RunError: there is no run, no such checkpoint, no intact one, or the run is of another network, schedule or
            data.
    """
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')) and last_saved(workdir) is None:
        raise RunError(f'there is no run in {workdir} (it has no folder checkpoints/): train one with --mode=train')
    check_config(config, workdir)
    name = {'ema': 'ema', 'raw': 'params'}[weights]
    with open_checkpoints(config, workdir) as checkpoints, intact():
        trees, accept = {name: getattr(abstract, name)}, require_same_run(config, workdir)
        steps = checkpoints.steps()
        if step < 0 or not steps:
            found = checkpoints.restore_newest(say, accept, **trees)
        elif step in steps:
            found = step, checkpoints.restore(step, accept, **trees)
        else:
            raise RunError(
                f'there is no checkpoint of step {step} in {checkpoints.directory}; there are those of the steps '
                f'{", ".join(map(str, sorted(steps)))} (train.keep_checkpoints says how many are kept)'
            )
    if found is None:
        saved = last_saved(workdir)
        why = 'yet: train on with --mode=train'
        if saved is not None:
            why = f'any more, although step {saved} was saved: restore it from a copy'
        raise RunError(f'there is no complete checkpoint in {workdir}/checkpoints {why}')
    step, (params,) = found
    return step, params


def digest(params: Any) -> str:
    """Return a SHA-256 of all parameters, which identifies them in records. All hosts have to call it."""
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        result.update(mesh.gather(leaf).tobytes())
    return result.hexdigest()


def use_compile_cache(config: ConfigDict) -> None:
    """Keep compiled programs where config.compile_cache says, so that the next start need not compile them.

    It is never a folder of the workdir, which may be someone else's: reading a compiled program runs it.
    """
    asked = config.compile_cache
    if asked == 'off' or (not asked and 'JAX_COMPILATION_CACHE_DIR' in os.environ):
        return
    try:
        cache_programs(private_folder(asked or os.path.join(cache_folder(), 'compiled')))
    except OSError as error:
        say(f'compiled programs are not kept (config.compile_cache): {error}')
