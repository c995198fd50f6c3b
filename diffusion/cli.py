"""The command line: `diffusion` once installed, `python main.py` in a checkout.

Nothing heavy is imported before the flags are known to be good.
"""

import ast
import contextlib
import glob
import importlib
import io
import os
import re
import sys
import tokenize
import traceback
from collections.abc import Iterator, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffusion import limits
from diffusion.runtime import interrupt
from diffusion.runtime.interrupt import EXIT_STATUS
from diffusion.util import PATIENCE, Output, RunError, file_of_config, first_line, say_here

MODES = {
    'train': 'train, or resume training',
    'sample': 'draw images, and compute their metrics',
    'likelihood': 'compute every likelihood, term by term',
    'evaluate': 'compute the metrics of images that were made elsewhere',
    'sweep': "compute the metrics for several numbers of steps and η, as in DDIM's Table 1",
    'compare': 'test the difference of two records of images: --mode=compare A/record.json B/record.json',
    'reference': 'compute the features of the data, with which samples are compared',
    'plan': 'compile for accelerators that need not be here: what fits, and what it costs',
    'data': 'show what the network will see',
    'import_weights': "make a workdir from another project's weights",
    'export': 'write a folder for diffusers',
}
ALIASES = {'import': 'import_weights'}
CONFIGS = os.path.join(os.path.dirname(__file__), 'configs')
RUN = 'workdir'  # the config of an existing run

HELP = """\
Train a diffusion model, sample it, or compute its likelihood.

  diffusion --config=digits --workdir=runs/digits          train, or resume training
  diffusion --workdir=runs/digits --mode=sample            draw images, and compute their metrics
  diffusion --workdir=runs/digits --mode=likelihood        every likelihood, term by term

`python main.py` in a checkout is the same command.

--config=NAME or PATH.py    one of {configs}; or a file of your own;
                            a workdir that holds a run needs none
--workdir=FOLDER            checkpoints, logs, samples
--mode=MODE                 the default is train
{modes}
Every key can be changed, as --config.train.batch_size=64. The keys, with the defaults of configs/default.py:

{keys}"""

config_flags.DEFINE_config_file('config', None, 'A config by its name, or a Python file.', lock_config=True)
flags.DEFINE_string('workdir', None, 'The folder of the run: checkpoints, logs, samples.')
flags.DEFINE_enum('mode', 'train', [*MODES, *ALIASES], 'What to do.')
flags.mark_flags_as_required(['config', 'workdir'])  # `parse` fills in the config of a run


def main() -> None:
    """Run the command in sys.argv, and exit."""
    interrupt.listen()
    logging.set_verbosity(logging.FATAL)  # what libraries log reaches the user as our errors, or by --verbosity
    try:
        records = to_compare(sys.argv[1:])
        if records is None:
            app.run(_run, flags_parser=parse)
        else:
            compare(records)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            Output(sys.stderr, PATIENCE).write(f'{stop.code}\n')
            stop = SystemExit(1)
        raise stop
    finally:
        _give_up_dead_streams()


def _give_up_dead_streams():
    """Let what a stream could not write end in /dev/null: at exit, Python would make a failure of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def to_compare(words: Sequence[str]) -> list[str] | None:
    """Return what follows --mode=compare, which takes two files and nothing else; None for another mode."""
    text = '\n'.join(words)
    mode = re.search(r'^--?mode(=|\n)compare$', text, re.MULTILINE)
    rest = text[: mode.start()] + text[mode.end() :] if mode else ''
    return [word for word in rest.split('\n') if word] if mode else None


def compare(records: list[str]) -> None:
    """Compare two records, and exit."""
    flag = next((word for word in records if word.startswith('-')), None)
    if flag and re.fullmatch(r'--?(help\w*|h)', flag):
        print_help()
    if flag:
        sys.exit(f'error: {flag}: --mode=compare takes two records, and no other flags')
    from diffusion.modes.compare import run  # imports JAX

    try:
        sys.exit(run(records))
    except RunError as error:
        sys.exit(f'error: {error}')


def _run(argv):
    if len(argv) > 1:
        sys.exit(f'error: unexpected argument {argv[1]!r}: flags start with --')
    require_keys(flags.FLAGS.config)
    workdir = folder(flags.FLAGS.workdir)
    record_command()
    mode = ALIASES.get(flags.FLAGS.mode, flags.FLAGS.mode)
    say_here('loading JAX …')
    from diffusion import build
    from diffusion.runtime import hosts, memory, targets

    module = importlib.import_module(f'diffusion.modes.{mode}')
    try:
        if mode == 'plan':
            os.environ.update(targets.prepare(flags.FLAGS.config.plan.target))
        build.join_hosts(flags.FLAGS.config, mode)
        interrupt.listen()  # again: JAX has a handler of its own for several hosts
        with _compiled():
            status = module.run(flags.FLAGS.config, workdir)
        sys.exit(status)
    except KeyboardInterrupt:  # at the end of what a signal had to wait for
        interrupt.end()
    except Exception as error:
        interrupt.wait_for_end()
        lost, exhausted = hosts.lost(error), memory.exhausted(error)
        if lost:
            _report(lost)
            os._exit(EXIT_STATUS)  # at once: handlers that run at exit would wait for the lost host
        if exhausted:
            message = f'{exhausted}: {getattr(module, "MEMORY", "free some")}'
        elif isinstance(error, RunError):
            message = str(error)
        else:  # a bug
            Output(sys.stderr, PATIENCE).write(traceback.format_exc())
            hosts.end_all(f'{type(error).__name__}: {first_line(error)}')
            sys.exit(1)
        _report(message)
        hosts.end_all(message)
        sys.exit(1)


def _compiled():
    """Return a context with compilation: JAX_DISABLE_JIT cannot run programs compiled ahead of time, as ours are."""
    import jax

    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        say_here('JAX_DISABLE_JIT has no effect: all modes compile whole programs')
    return jax.disable_jit(False)


def _report(message):
    """Print the one line of an error."""
    Output(sys.stderr, PATIENCE).write(f'error: {message}\n')


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags. Exit with one line about the flag that is wrong, or after printing the help."""
    text = '\n'.join(argv)
    if re.search(r'^--?(help\w*|h|\?)$', text, re.MULTILINE):
        print_help()
    for word in argv[1:]:
        flag = word.partition('=')[0]
        if re.match(r'--?config\W', flag) and not re.fullmatch(r'--?config(\.\w+)+', flag):
            sys.exit(f'error: {word}: the value of a key is set by --config.GROUP.KEY=VALUE')
    if '--config=' in argv:
        sys.exit('error: --config= is empty: it takes a name or PATH.py')
    argv, path = find_config(config_of_run(argv))
    file = path.partition(':')[0]
    if path and not (os.path.isfile(file) and file.endswith('.py')):
        known = ', '.join(config_names())
        sys.exit(f'error: --config={path}: no such Python file; the configs by name, in configs/, are {known}')
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if not path and 'flag --config=None' in str(error):
            sys.exit('error: --config is missing, a name or PATH.py; only a --workdir that holds a run needs none')
        if path and re.search(r'^flag --config=None:', str(error)):
            sys.exit(f'error: --config={path}: get_config() returns None; it must return the config')
        if 'TypeError: get_config() takes 0 positional arguments' in str(error):
            sys.exit(
                f'error: --config={path}: {file} takes nothing after a colon; configs/workdir.py takes a workdir there'
            )
        if 'Error whilst parsing config file' in str(error):  # the text of a TypeError's traceback
            lines = re.findall(rf'File "{re.escape(file)}", line (\d+)', str(error))
            where = f'line {lines[-1]}' if lines else 'get_config'
            sys.exit(f'error: --config={path}: {where}: {str(error).strip().splitlines()[-1]}')
        sys.exit(f'error: {error}')
    except Exception as error:
        wrong_line = error_in(file, error)
        if wrong_line:
            sys.exit(f'error: --config={path}: {wrong_line}')
        # The message names the key, or a dotted path whose last part was looked up in a value instead of a group.
        key = re.search(r'lookup: [\w.]*?(\w+)\W*$', str(error)) or re.search(r'(\w+)', str(error))
        wrong = [word for word in argv if key and key[1] in word.partition('=')[0].split('.')]
        if not key or not wrong:
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f'did you mean {near[1]!r}?' if near else 'configs/default.py has all keys, and --help lists them'
        sys.exit(f'error: {wrong[0]}: the config has no key {key[1]!r}; {hint}')


def config_of_run(argv: Sequence[str]) -> list[str]:
    """Add the config of the run in --workdir if no config is asked for and there is such a run."""
    given = dict(re.findall(r'^--?(config|workdir)(?:=|\n)(.*)$', '\n'.join(argv), re.MULTILINE))
    place = os.path.abspath(os.path.expanduser(given.get('workdir', '')))
    if 'config' in given or not given.get('workdir') or not file_of_config(place):
        return list(argv)
    return [*argv[:1], f'--config={RUN}:{place}', *argv[1:]]


def record_command() -> None:
    """Set config.command, by which a run knows what its command line changed in which config."""
    command = flags.FLAGS.config.command
    path = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')[0]
    name = os.path.splitext(os.path.basename(path))[0]
    ours = os.path.realpath(os.path.dirname(path)) == os.path.realpath(CONFIGS)
    command.config = os.path.abspath(path) if not ours else '' if name == RUN else name
    command.overrides = tuple(sorted(config_flags.get_override_values(flags.FLAGS['config'])))


def print_help() -> None:
    """Print the help, and exit."""
    Output(sys.stdout, 3600).write(f'{help_text()}\n')  # a pager reads slowly
    sys.exit(0)


def error_in(file: str, error: Exception) -> str | None:
    """Return the line and the message of an error that a config file has, or None if it is not the file's."""
    if isinstance(error, SyntaxError) and error.filename and os.path.abspath(error.filename) == os.path.abspath(file):
        return f'line {error.lineno}: {error.msg}'
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    if lines:
        return f'line {lines[-1]}: {type(error).__name__}: {first_line(error)}'
    if "no attribute 'get_config'" in str(error):
        return 'it has no function get_config, which returns the config'
    return None


def require_keys(config: object) -> None:
    """Exit with one line unless a config has every key."""
    if not isinstance(config, ConfigDict):
        sys.exit(f'error: --config: get_config() returns a {type(config).__name__}; it must return a ConfigDict')
    for key, _, _ in documented_keys():
        group, _, name = key.rpartition('.')
        if name not in (config.get(group, {}) if group else config):
            sys.exit(
                f'error: --config: the config lacks {key}: begin with `config = default.get_config()`, where default '
                'is diffusion.configs.default'
            )


def find_config(argv: Sequence[str]) -> tuple[list[str], str]:
    """Replace the name of a config by its path.

    Returns:
        (argv, the path with what follows a colon; '' if no config is asked for).
    """
    found, path = list(argv), ''
    for i, word in enumerate(argv):
        flag, equals, value = word.partition('=')
        if flag.lstrip('-') != 'config' or not flag.startswith('-'):
            continue
        place = i if equals else i + 1
        if place == len(argv):
            continue
        name, colon, argument = (value if equals else argv[place]).partition(':')
        known = name.removeprefix('configs/').removesuffix('.py')  # as in a checkout, but from any folder
        if name in config_names() or (known in config_names() and not os.path.isfile(name)):
            name = os.path.join(CONFIGS, f'{known}.py')
        path = name + colon + argument
        found[place] = f'{flag}={path}' if equals else path
    return found, path


def config_names() -> list[str]:
    """Return the names of the configs that come with the package."""
    paths = glob.glob(os.path.join(CONFIGS, '[!_]*.py'))
    return sorted(os.path.splitext(os.path.basename(path))[0] for path in paths)


def folder(path: str) -> str:
    """Return the absolute path of a workdir. Exit with one line if it cannot be a folder."""
    wrong = f'error: --workdir={path}'
    if not path:
        sys.exit(f'{wrong} is not a folder')
    if '://' in path:
        sys.exit(f'{wrong}: a workdir is a folder; mount the bucket as a file system, and name the folder there')
    absolute = existing = os.path.abspath(os.path.expanduser(path))
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        kind = 'a file' if os.path.exists(existing) else 'a broken link'
        sys.exit(f'{wrong} cannot be a folder: {existing} is {kind}')
    return absolute


def help_text() -> str:
    """Return the help: modes, configs, and every key with its default, meaning and limits."""
    modes = ''.join(f'    {mode:<24}{what}\n' for mode, what in MODES.items())
    keys = []
    for key, value, comment in documented_keys():
        if key.startswith('command.'):  # the command line sets these itself
            continue
        limit = limits.LIMITS.get(key)
        allowed = f' ({limit.without_imports()})' if isinstance(limit, (limits.OneOf, limits.SomeOf)) else ''
        keys.append(f'  --config.{key}={value}\n      {comment}{allowed}\n')
    return HELP.format(configs=', '.join(config_names()), modes=modes, keys=''.join(keys))


def documented_keys() -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, comment) for each assignment of configs/default.py, from its source.

    The comment is that on the same line, or else the lines of comment above.
    """
    with open(os.path.join(CONFIGS, 'default.py'), encoding='utf-8') as file:
        source = file.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        value = ast.unparse(node.value)
        if value == 'ConfigDict()':
            continue
        own = [comments[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in comments]
        first = node.lineno
        while first - 1 in comments and lines[first - 2].lstrip().startswith('#'):
            first -= 1
        comment = own or [comments[line] for line in range(first, node.lineno)]
        yield ast.unparse(node.targets[0]).removeprefix('config.'), value, ' '.join(comment)


if __name__ == '__main__':
    main()
