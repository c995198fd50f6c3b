"""The house: who may import whom, and that every room can be entered."""

import ast
import importlib
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for folder in ('diffusion', 'configs')
    for path in (ROOT / folder).rglob('*.py')
)
# Each may import those below it, and its own folder.
ORDER = [
    'preview',
    'adopt',
    'publish',
    'train',
    'generate',
    'evaluate',
    'experiment',
    'rules',
    'loss',
    'sampler',
    'likelihood',
    'gaussian',
    'compat',
    'schedule',
]
SUPPLIERS = ['networks', 'data', 'runtime', 'interop', 'metrics', 'report']
RUN = ORDER[: ORDER.index('experiment') + 1]


def room(module):
    return module.split('.')[1] if '.' in module else ''


def imports(module):
    path = ROOT / pathlib.Path(*module.split('.'))
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module}: relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
            yield node.module


@pytest.mark.parametrize('module', [m for m in MODULES if m.startswith('diffusion.')])
def test_imports_go_down(module):
    me = room(module)
    assert me in ORDER + SUPPLIERS, f'{module} is in no known room'
    for name in imports(module):
        if not name.startswith('diffusion.') or room(name) == me:
            continue
        other = room(name)
        if me in SUPPLIERS:
            pytest.fail(f'{module} is a supplier, and imports {name}')
        elif other in SUPPLIERS:
            assert me in RUN, f'{module} is of the paper, and imports the supplier {name}'
        else:
            assert ORDER.index(other) > ORDER.index(me), f'{module} imports {name}, which stands above it'


@pytest.mark.parametrize('module', MODULES)
def test_every_module_imports(module):
    importlib.import_module(module)


def test_help_is_quick_and_imports_no_jax():
    program = (
        'import sys, runpy\n'
        "sys.argv = ['main.py', '--help']\n"
        'try:\n'
        "    runpy.run_path('main.py', run_name='__main__')\n"
        'except SystemExit:\n'
        '    pass\n'
        "assert not {'jax', 'numpy', 'flax', 'tensorflow'} & set(sys.modules)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert '--workdir' in done.stdout
    assert seconds < 2
