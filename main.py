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
import sys

from absl import app, flags, logging
from ml_collections import config_flags

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
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:
        # The first word is the key, or the last of a path where a value was taken for a group of keys.
        key = re.search(r'lookup: [\w.]*?(\w+)\W*$', str(error)) or re.search(r'(\w+)', str(error))
        wrong = [word for word in argv if key and key[1] in word.partition('=')[0].split('.')]
        if not wrong:  # the config file itself is at fault: its author needs the traceback
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f'did you mean {near[1]!r}?' if near else 'configs/default.py has them all'
        sys.exit(f'error: {wrong[0]}: the config has no key {key[1]!r}; {hint}')


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}: flags start with --')
    workdir = os.path.abspath(os.path.expanduser(flags.FLAGS.workdir))
    if not flags.FLAGS.workdir or (os.path.exists(workdir) and not os.path.isdir(workdir)):
        sys.exit(f'error: --workdir={flags.FLAGS.workdir} is no folder')
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.FATAL)  # what libraries find wrong reaches the user as our errors
    try:
        from diffusion import experiment  # imports JAX, once the flags are known to be good
        from diffusion.runtime.interrupt import EXIT_STATUS

        run = importlib.import_module(MODES[flags.FLAGS.mode]).run
    except KeyboardInterrupt:
        sys.exit('interrupted')
    try:
        experiment.begin(flags.FLAGS.config, flags.FLAGS.mode)
        sys.exit(run(flags.FLAGS.config, workdir))
    except experiment.RunError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted')
    except Exception as error:
        message = experiment.distributed.lost(error)
        if message is None:
            raise
        print(f'error: {message}', file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)  # at once: what is registered to run at the end would wait for the host that has gone


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
