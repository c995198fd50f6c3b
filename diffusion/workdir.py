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
from diffusion.runtime import hosts, mesh
from diffusion.runtime.checkpoints import Checkpoints, DamagedError, OtherArraysError, newest_record
from diffusion.runtime.compilation import cache_programs
from diffusion.util import FileLock, RunError, first_line, read_json, say, write_json

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
)
INTERVALS = ('num_steps', 'checkpoint_every', 'keep_checkpoints', 'log_every', 'sample_every')  # change no parameter

# The types of what is read from a config.json, and from its record of the images.
STORED = {'data': dict, 'model': dict, 'schedule': dict, 'train': dict, 'images': dict, 'changes': list}
STORED_IMAGES = {'count': int, 'fingerprint': str, 'sha256': str, 'channel_means': list}


def resolve(config: ConfigDict, workdir: str) -> ConfigDict:
    """Check the config's values and fill in what it leaves open: from the run in `workdir`, else from the pictures.

    Raises:
        RunError: a key has a value that it may not have, config.json is damaged, or no picture can be decoded.
    """
    check(config)
    config = config.copy_and_resolve_references()
    stored = None if autoconfig.is_complete(config) else read_config(workdir)
    if stored:
        try:
            for key in ('image_size', 'channels'):
                config.data[key] = config.data[key] or stored['data'][key]
            allowed = stored['data'].get('max_bad_fraction', 0.0)  # chosen with the image size
            config.data.max_bad_fraction = max(config.data.max_bad_fraction, allowed)
            if not config.model.channels:
                config.model.update({key: stored['model'][key] for key in autoconfig.CHOSEN})
        except (KeyError, TypeError) as error:
            raise _unreadable(workdir, f'{type(error).__name__}: {error}') from error
    return config if autoconfig.is_complete(config) else autoconfig.complete(config)


def check(config: ConfigDict) -> None:
    """Raise RunError, which names the key, for a value that the key may not have."""
    try:
        limits.check(config)
    except ValueError as error:
        raise RunError(str(error)) from error


def read_config(workdir: str) -> dict[str, Any] | None:
    """Return what config.json holds; if it is missing, the copy in the newest checkpoint; None if there is none.

    Raises:
        RunError: config.json is damaged.
    """
    try:
        stored = read_json(os.path.join(workdir, 'config.json'))
        _require_config(stored)
    except FileNotFoundError:
        stored = newest_record(os.path.join(workdir, 'checkpoints'))
        with contextlib.suppress(ValueError):
            _require_config(stored)
            return stored if 'model' in stored else None
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(workdir, error) from error
    return stored


def check_config(config: ConfigDict, workdir: str, images: data.Images | None = None) -> None:
    """Check that `workdir` holds no run of another network, schedule or data.

    Args:
        config: what is asked, resolved.
        workdir: the folder of the run.
        images: the training images; if given, they must be those that the run was trained on.

    Raises:
        RunError: it does; the message lists the differences.
    """
    stored = read_config(workdir)
    if stored is None:
        return
    differences = _differences(config, stored)
    trained_on = stored.get('images', {})
    if images is not None and trained_on and trained_on['sha256'] != images.record['sha256']:
        here = images.record
        differences.append(
            f'    the images: {trained_on["count"]}, preprocessing {trained_on["fingerprint"]} there; '
            f'{here["count"]}, preprocessing {here["fingerprint"]} in {config.data.source}'
        )
        if (trained_on['count'], trained_on['fingerprint']) == (here['count'], here['fingerprint']):
            differences.append(
                f'        as many, but with SHA-256 {trained_on["sha256"][:12]}… there, {here["sha256"][:12]}… here: '
                'a picture was replaced, or renamed (the order is that of the names)'
            )
    if differences:
        lines = '\n'.join(differences)
        raise RunError(f'{workdir} holds another run:\n{lines}\nAsk for the same, or choose another --workdir.')


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
            lines = '\n'.join(differences)
            raise RunError(f'{path} was saved by another run:\n{lines}\nAsk for the same, or choose another --workdir.')

    return accept


def write_config(config: ConfigDict, workdir: str, images: data.Images | None = None, step: int = 0) -> dict[str, Any]:
    """Write config.json, against which later commands are checked.

    If `workdir` has one already, settings of training that differ from `step` on are printed and recorded in it.

    Args:
        config: what is asked, resolved.
        workdir: the folder of the run.
        images: the training images, if there are any.
        step: the number of training steps that the run has done.

    Returns:
        What config.json holds now; each checkpoint keeps a copy.
    """
    stored, asked = read_config(workdir) or {}, plain(config)
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
    asked |= {'changes': changes} if changes else {}
    if hosts.is_first():
        write_json(os.path.join(workdir, 'config.json'), asked)
    return asked


def _differences(config: ConfigDict, stored: dict[str, Any]) -> list[str]:
    """A line for each key in which a config differs from that of a run."""
    asked, defaults = plain(config), plain(default.get_config())
    lines = []
    for part in IDENTITY:
        # A run from before a key existed has the key's default.
        before = {key: defaults[part].get(key) for key in asked[part]} | stored.get(part, {})
        lines += [
            f'    config.{part}.{key}: {before.get(key)!r} there, {asked[part].get(key)!r} asked'
            for key in sorted(asked[part].keys() | before.keys())
            if key not in INCIDENTAL and before.get(key) != asked[part].get(key)
        ]
    return lines


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a config as JSON gives it back, as config.json and checkpoints hold it."""
    return json.loads(json.dumps(config.to_dict()))


def _require_config(stored):
    """Raise ValueError unless `stored` is what a config.json may hold, as far as it is read."""
    _require_types(stored, {part: kind for part, kind in STORED.items() if isinstance(stored, dict) and part in stored})
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
    return RunError(f'{path} cannot be read ({why}): restore it, or choose another --workdir')


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
def writing(folder: str, error_type: type[Exception] = OSError) -> Iterator[None]:
    """Turn an OSError, or an `error_type`, within the context into a RunError that names the folder."""
    try:
        yield
    except (OSError, error_type) as error:
        raise RunError(
            f'{folder} cannot be written ({first_line(error)}): free some space or repair it, or choose another '
            '--workdir'
        ) from error


def make_folder(*path: str) -> str:
    """Make a folder and check that it can be written, before anything is computed.

    Args:
        path: its parts, the workdir first.

    Returns:
        The path.

    Raises:
        RunError: it cannot be made or written.
    """
    folder = os.path.join(*path)
    with writing(folder):
        if hosts.is_first():
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b'written')
    return folder


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
    saved = last_saved(workdir)
    if saved is None:
        return
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


def load_params(abstract: Any, config: ConfigDict, workdir: str, weights: str) -> tuple[int, Any]:
    """Read parameters from the newest checkpoint.

    Args:
        abstract: shapes and shardings of a TrainState, as `Experiment.abstract_state` gives them.
        config: what is asked, resolved.
        workdir: the folder of the run.
        weights: 'ema' or 'raw'.

    Returns:
        (step, params).

    Raises:
        RunError: there is no run, no checkpoint, no intact one, or the run is of another network, schedule or data.
    """
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')) and last_saved(workdir) is None:
        raise RunError(f'there is no run in {workdir} (it has no folder checkpoints/): train one with --mode=train')
    check_config(config, workdir)
    name = {'ema': 'ema', 'raw': 'params'}[weights]
    with open_checkpoints(config, workdir) as checkpoints, intact():
        trees = {name: getattr(abstract, name)}
        found = checkpoints.restore_newest(say, require_same_run(config, workdir), **trees)
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


def use_compile_cache(config: ConfigDict, workdir: str) -> None:
    """Keep compiled programs where config.compile_cache says, so that the next start need not compile them."""
    if config.compile_cache != 'off':
        cache_programs(os.path.join(workdir, 'compiled') if config.compile_cache == 'workdir' else config.compile_cache)
