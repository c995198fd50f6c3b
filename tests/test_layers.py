"""The order of the modules, the annotations of their public functions, and global state that they must not change."""

import ast
import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from tests.xla_flags import FAST_TO_COMPILE

ROOT = pathlib.Path(__file__).parent.parent

# Each may import those after it, and those of its own folder.
ORDER = [
    '__main__',
    'cli',
    'modes',
    'conditions',
    'build',
    'workdir',
    'autoconfig',
    'limits',
    'guidance',
    'loss',
    'sampler',
    'compat',
    'likelihood',
    'gaussian',
    'schedule',
]
PAPER = ORDER[ORDER.index('guidance') :]
SUPPLIERS = ['networks', 'data', 'runtime', 'interop', 'metrics', 'report']
# May import suppliers and util.
ABOVE_SUPPLIERS = ['__main__', 'cli', 'modes', 'conditions', 'build', 'workdir', 'autoconfig']
ANNOTATED = [*PAPER, 'networks', 'metrics']


def modules_in(folder, name):
    """{name of a module: its file}."""
    found = {}
    for path in sorted(folder.rglob('*.py')):
        parts = path.relative_to(folder).with_suffix('').parts
        found['.'.join((name, *parts)).removesuffix('.__init__')] = path
    return found


CONFIGS = modules_in(ROOT / 'configs', 'diffusion.configs')
MODULES = modules_in(ROOT / 'diffusion', 'diffusion') | CONFIGS  # a search does not follow the link to the configs


def imports(module):
    """The names of the modules that a module imports, and of what it imports from them."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module}: relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
            yield node.module


def tree(module):
    return ast.parse(MODULES[module].read_text(encoding='utf-8'))


def part(module):
    """The part of the project that a module belongs to: 'modes' for 'diffusion.modes.train'; '' for 'diffusion'."""
    return module.split('.')[1] if '.' in module else ''


def allowed(importer):
    """The parts that a part may import, beside itself."""
    if importer in (*SUPPLIERS, 'configs'):
        return ['util']
    below = ORDER[ORDER.index(importer) + 1 :] if importer in ORDER else []
    suppliers = [*SUPPLIERS, 'util'] if importer in ABOVE_SUPPLIERS else []
    return below + suppliers + (['configs'] if importer == 'workdir' else [])


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_down(module):
    known = {'', 'util', 'configs', *ORDER, *SUPPLIERS}
    assert part(module) in known, f'{module} has no place in the order'
    for name in imports(module):
        if name.split('.')[0] == 'configs':
            pytest.fail(f'{module} imports {name}, which is not installed: it is diffusion.configs')
        if not name.startswith('diffusion.') or part(name) == part(module):
            continue
        assert part(name) in allowed(part(module)), f'{module} imports {name}'


@pytest.mark.parametrize('importer', PAPER)
def test_the_paper_is_free_of_files_configs_and_devices(importer):
    """No module of the paper imports what would give it one of them."""
    foreign = {'os', 'io', 'pathlib', 'etils', 'orbax', 'ml_collections', 'absl', 'tqdm', 'flax'}
    used = {name.split('.')[0] for module in MODULES if part(module) == importer for name in imports(module)}
    assert not used & foreign
    assert 'jax.sharding' not in {name for module in MODULES if part(module) == importer for name in imports(module)}


@pytest.mark.parametrize('module', MODULES)
def test_every_module_imports(module):
    importlib.import_module(module)


def public_functions(module):
    """(name, definition) of the functions of a module and of the methods of its classes that have no leading _."""
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    not method.name.startswith('_') or method.name in ('__init__', '__call__')
                ):
                    yield f'{node.name}.{method.name}', method


@pytest.mark.parametrize('module', [module for module in MODULES if part(module) in ANNOTATED])
def test_public_functions_are_annotated(module):
    for name, function in public_functions(module):
        given = function.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [p.arg for p in parameters if p and not p.annotation and p.arg not in ('self', 'cls')]
        assert not bare, f'{module}.{name}: no annotation for {", ".join(bare)}'
        assert function.returns or name.endswith('.__init__'), f'{module}.{name}: no annotation for the result'


# What belongs to the whole process, and so to whoever imports the library.


PATCHING = {
    'contextlib.redirect_stdout',
    'contextlib.redirect_stderr',
    'logging.disable',
    'mock.patch',
}


@pytest.mark.parametrize('module', [module for module in MODULES if part(module) != 'cli'])
def test_no_module_replaces_what_belongs_to_the_process(module):
    """Not even for a while, because another thread would see it. The command line owns its process."""
    for node in ast.walk(tree(module)):
        if not isinstance(node, (ast.Attribute, ast.Subscript)):
            continue
        text = ast.unparse(node)
        assert text not in PATCHING and not text.endswith('.setLevel'), f'{module}: {text}'
        if not isinstance(node.ctx, ast.Load):
            assert not text.startswith(('sys.', 'os.', 'warnings.', 'logging.')), f'{module}: {text} is assigned'


PATCHES = """
import asyncio, logging, os, pathlib, sys, threading

def process():
    loggers = {name: logging.getLogger(name) for name in ('', 'asyncio', 'concurrent.futures')}
    return {
        'excepthook': sys.excepthook,
        'unraisablehook': sys.unraisablehook,
        'threading.excepthook': threading.excepthook,
        'displayhook': sys.displayhook,
        'stdout': sys.stdout,
        'stderr': sys.stderr,
        'loggers': {name: (l.level, list(l.filters), l.disabled) for name, l in loggers.items()},
        'disabled logging': logging.root.manager.disable,
    }

before, modules = process(), dict(sys.modules)

from tests import runs
from tests.test_layers import MODULES
import importlib
for module in MODULES:
    importlib.import_module(module)
assert process() == before, 'after importing'

from diffusion.modes import sample, train
workdir = pathlib.Path(sys.argv[1])
config = runs.quick({'train.num_steps': 3, 'train.checkpoint_every': 1, 'sample.num_images': 4, 'sample.num_steps': 2})
assert train.run(config, str(workdir)) == 0
for path in (workdir / 'checkpoints' / '3' / 'params').rglob('*'):  # so that reading it fails
    if path.is_file():
        os.truncate(path, 0)
assert train.run(config, str(workdir)) == 0
assert sample.run(config, str(workdir)) == 0

after = process()
assert after == before, (before, after)
replaced = [name for name, module in modules.items() if sys.modules.get(name) is not module]
assert not replaced, replaced
hidden = [name for name, module in sys.modules.items() if module is None and modules.get(name, '') is not None]
assert not hidden, hidden
"""


@pytest.mark.slow
def test_the_library_leaves_the_process_as_it_was(tmp_path):
    """Importing all of it, training, resuming from a damaged checkpoint and sampling replace nothing."""
    done = subprocess.run(
        [sys.executable, '-c', PATCHES, str(tmp_path / 'run')],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': FAST_TO_COMPILE},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 'is damaged' in done.stdout
