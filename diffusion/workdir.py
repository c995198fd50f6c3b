"""What a run keeps on disk, and how it is checked: config.json, the lock, checkpoints, output folders.

workdir/
  config.json          what was asked, and which images it was trained on
  checkpoints/<step>/  written by Orbax
  logs/  samples/  likelihood/  data/  export/
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import autoconfig, data, limits
from diffusion.configs import default
from diffusion.runtime import hosts, mesh
from diffusion.runtime.checkpoints import Checkpoints, DamagedError
from diffusion.runtime.compilation import cache_programs
from diffusion.util import FileLock, RunError, first_line, say, write_json

# A run keeps its data, network and schedule; where the images lie, how they are read, and the precision may change.
IDENTITY = ('data', 'model', 'schedule')
INCIDENTAL = (
    'source',
    'data_dir',
    'cache',
    'cache_dir',
    'placement',
    'max_bad_fraction',
    'implementation',
    'dtype',
    'remat',
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
    """Return what config.json holds, or None if `workdir` has none.

    Raises:
        RunError: config.json is damaged.
    """
    try:
        with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
            stored = json.load(file)
        _require_types(stored, {part: kind for part, kind in STORED.items() if part in stored})
        if 'images' in stored:
            _require_types(stored['images'], STORED_IMAGES)
            if not all(isinstance(mean, (int, float)) for mean in stored['images']['channel_means']):
                raise ValueError('channel_means are not numbers')
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
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
    asked, defaults = _plain(config), _plain(default.get_config())
    differences = []
    for part in IDENTITY:
        # A run from before a key existed has the key's default.
        before = {key: defaults[part].get(key) for key in asked[part]} | stored.get(part, {})
        differences += [
            f'    config.{part}.{key}: {before.get(key)!r} there, {asked[part].get(key)!r} asked'
            for key in sorted(asked[part].keys() | before.keys())
            if key not in INCIDENTAL and before.get(key) != asked[part].get(key)
        ]
    trained_on = stored.get('images', {})
    if images is not None and trained_on and trained_on['sha256'] != images.record['sha256']:
        differences.append(
            f'    the images: {trained_on["count"]}, preprocessing {trained_on["fingerprint"]} there; '
            f'{images.record["count"]}, preprocessing {images.record["fingerprint"]} in {config.data.source}'
        )
    if differences:
        lines = '\n'.join(differences)
        raise RunError(f'{workdir} holds another run:\n{lines}\nAsk for the same, or choose another --workdir.')


def write_config(config: ConfigDict, workdir: str, images: data.Images | None = None, step: int = 0) -> None:
    """Write config.json, against which later commands are checked.

    If `workdir` has one already, settings of training that differ from `step` on are printed and recorded in it.

    Args:
        config: what is asked, resolved.
        workdir: the folder of the run.
        images: the training images, if there are any.
        step: the number of training steps that the run has done.
    """
    stored, asked = read_config(workdir) or {}, _plain(config)
    changes = stored.get('changes', [])
    if stored and step:
        before, now = ({'seed': c.get('seed')} | c.get('train', {}) for c in (stored, asked))
        for key in now:
            if before.get(key) == now[key]:
                continue
            name = 'config.seed' if key == 'seed' else f'config.train.{key}'
            changes.append({'step': step, 'key': name, 'before': before.get(key), 'after': now[key]})
            if key not in INTERVALS:
                say(f'{name} is {now[key]!r} from step {step} on; it was {before.get(key)!r}')
    if images is not None:
        asked['images'] = images.record
    if hosts.is_first():
        write_json(os.path.join(workdir, 'config.json'), asked | ({'changes': changes} if changes else {}))


def _plain(config):
    """The config as JSON would give it back."""
    return json.loads(json.dumps(config.to_dict()))


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
    return Checkpoints(folder, keep=config.train.keep_checkpoints, writing=writing)


@contextlib.contextmanager
def intact() -> Iterator[None]:
    """Turn the DamagedError of checkpoints that are all damaged into a RunError."""
    try:
        yield
    except DamagedError as error:
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
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise RunError(f'there is no run in {workdir} (it has no folder checkpoints/): train one with --mode=train')
    check_config(config, workdir)
    name = {'ema': 'ema', 'raw': 'params'}[weights]
    with open_checkpoints(config, workdir) as checkpoints, intact():
        found = checkpoints.restore_newest(say, **{name: getattr(abstract, name)})
    if found is None:
        raise RunError(f'there is no complete checkpoint in {workdir}/checkpoints yet: train on with --mode=train')
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
