"""Train a diffusion model, sample it, or compute its likelihood.

    python main.py --config=configs/digits.py --workdir=runs/digits                    train, or go on training
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=sample      draw images
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=likelihood  every likelihood, term by term
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=data        what the network will see
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=export      a folder for diffusers
    python main.py --config=configs/digits.py --workdir=runs/other --mode=import --config.interop.source=diffusers:PATH
    python main.py --config=configs/workdir.py:runs/other --workdir=runs/other --mode=sample

Any key of configs/default.py can be changed: --config.train.batch_size=64 --config.sample.eta=0.0
"""

import importlib
import os
import re
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from diffusion.runtime.interrupt import EXIT_STATUS

MODES = {
    'train': 'diffusion.train',
    'sample': 'diffusion.generate',
    'likelihood': 'diffusion.evaluate',
    'data': 'diffusion.preview',
    'import': 'diffusion.adopt',
    'export': 'diffusion.publish',
}

config_flags.DEFINE_config_file('config', None, 'The config file, as configs/digits.py.', lock_config=True)
flags.DEFINE_string('workdir', None, 'The folder of the run: checkpoints, logs, samples.')
flags.DEFINE_enum('mode', 'train', list(MODES), 'What to do.')
flags.mark_flags_as_required(['config', 'workdir'])


def parse(argv):
    """The flags; or one line that says what is wrong with them, and exit status 1."""
    for path in re.findall(r'^--?config[=\n](.*)$', '\n'.join(argv), re.MULTILINE):
        file = path.partition(':')[0]
        if not (os.path.isfile(file) and file.endswith('.py')):
            sys.exit(f'error: --config={path}: there is no such Python file; the configs are in configs/')
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:
        sys.exit(0 if re.search(r'^--?(help\w*|\?)$', '\n'.join(argv), re.MULTILINE) else end.code)
    except flags.Error as error:
        if 'TypeError: get_config() takes 0 positional arguments' in str(error):
            error = f'--config={path}: {file} takes nothing after a colon; configs/workdir.py takes a workdir there'
        sys.exit(f'error: {error}')
    except (AttributeError, KeyError, TypeError) as error:
        # The first word is the key, or the last of a path where a value was taken for a group of keys.
        key = re.search(r'lookup: [\w.]*?(\w+)\W*$', str(error)) or re.search(r'(\w+)', str(error))
        wrong = [word for word in argv if key and key[1] in word.partition('=')[0].split('.')]
        if not wrong:  # the config file itself is at fault: its author needs the traceback
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f'did you mean {near[1]!r}?' if near else 'configs/default.py has them all'
        sys.exit(f'error: {wrong[0]}: the config has no key {key[1]!r}; {hint}')


def folder(path):
    """The absolute path of a workdir; or one line that says why there cannot be one, and exit status 1."""
    wrong = f'error: --workdir={path}'
    if not path:
        sys.exit(f'{wrong} is no folder')
    if '://' in path:
        sys.exit(f'{wrong}: a workdir is a folder; mount the bucket as a file system, and name the folder there')
    whole = there = os.path.abspath(os.path.expanduser(path))
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        sys.exit(f'{wrong} cannot be a folder: {there} is {"a file" if os.path.exists(there) else "a broken link"}')
    return whole


def main(argv):
    if len(argv) > 1:
        sys.exit(f'error: unexpected argument {argv[1]!r}: flags start with --')
    workdir = folder(flags.FLAGS.workdir)
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.FATAL)  # what libraries find wrong reaches the user as our errors
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, wherever an Interrupt does not listen
    try:
        from diffusion import experiment  # imports JAX, once the flags are known to be good

        run = importlib.import_module(MODES[flags.FLAGS.mode]).run
    except KeyboardInterrupt as stop:
        end(stop)
    try:
        experiment.begin(flags.FLAGS.config, flags.FLAGS.mode)
        sys.exit(run(flags.FLAGS.config, workdir))
    except experiment.RunError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt as stop:
        end(stop)
    except Exception as error:
        message = experiment.distributed.lost(error)
        if message is None:
            raise
        print(f'error: {message}', file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)  # at once: what is registered to run at the end would wait for the host that has gone


def end(stop):
    """One line after a signal that ended the run where it was, and the exit status of what is to be typed again."""
    where = str(stop) or 'nothing is written yet; the same command starts over'
    print(f'interrupted: {where}', file=sys.stderr, flush=True)
    sys.exit(EXIT_STATUS)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
