"""The package: what a wheel contains, what the installed command does, and which versions it requires."""

import configparser
import email
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
FILES = ['setup.cfg', 'pyproject.toml', 'README.md', 'main.py']
FOLDERS = ['configs', 'diffusion', 'tests', 'benchmarks']
EXTRAS = {'cuda12', 'cuda13', 'tpu', 'plan', 'prepare', 'features', 'hub', 'peers', 'test'}
PYTHONS = ['3.11', '3.12', '3.13']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel of the working tree, built in a copy of it."""
    folder = tmp_path_factory.mktemp('wheel')
    (folder / 'tree').mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder / 'tree')
    for name in FOLDERS:
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, folder / 'tree' / name, symlinks=True, ignore=ignore)
    pip(folder / 'tree', 'wheel', '--no-build-isolation', '--wheel-dir', folder, '.')
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def site(wheel):
    """A folder in which the wheel is installed."""
    pip(wheel.parent, 'install', '--target', wheel.parent / 'site', wheel)
    return wheel.parent / 'site'


def pip(folder, *arguments):
    command = [sys.executable, '-m', 'pip', arguments[0], '--no-deps', '--no-index', *arguments[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def run(site, folder, *command):
    """Run a command in a folder, with the installed package."""
    environment = os.environ | {'PYTHONPATH': str(site)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_contains_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if '.dist-info/' not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / 'diffusion').rglob('*.py')}
    expected |= {f'diffusion/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
    assert found == expected | {'diffusion/py.typed'}


def test_the_extras_exist(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = email.message_from_bytes(archive.read(name))
    assert set(metadata.get_all('Provides-Extra')) == EXTRAS
    required = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    for extra in ('cuda12', 'cuda13', 'tpu'):
        mine = [r for r in required if r.marker and r.marker.evaluate({'extra': extra})]
        assert [(r.name, r.extras) for r in mine] == [('jax', {extra})]


def test_help_is_quick_and_imports_no_jax(site, tmp_path):
    program = (
        'import atexit, sys, time\n'
        "sys.argv = ['diffusion', '--help']\n"
        'from diffusion.cli import main\n'
        "atexit.register(lambda: print('seconds:', time.process_time(), *sys.modules))\n"
        'main()\n'
    )
    text, _, printed = run(site, tmp_path, sys.executable, '-c', program).partition('seconds:')
    seconds, *imported = printed.split()
    assert float(seconds) < 2  # of the processor, which other programs hardly change
    assert '--workdir' in text
    assert not {'jax', 'numpy', 'flax', 'tensorflow'} & set(imported)


@pytest.mark.slow
def test_the_command_runs_in_any_folder(site, tmp_path):
    command = [sys.executable, site / 'bin' / 'diffusion', '--config=digits', '--workdir=runs/x', '--mode=data']
    assert 'images of shape [8, 8, 1]' in run(site, tmp_path, *command)
    assert (tmp_path / 'runs' / 'x' / 'data' / 'grid.png').exists()


@pytest.mark.parametrize(
    ('place', 'config'), [('elsewhere', 'celeba'), ('checkout', 'celeba'), ('checkout', 'configs/celeba.py')]
)
def test_configs_are_found_by_name_anywhere_and_by_path_in_the_checkout(site, tmp_path, place, config):
    program = (
        'import sys, diffusion.cli\n'
        'from absl import flags\n'
        "diffusion.cli.parse(['diffusion', '--workdir=x', f'--config={sys.argv[1]}'])\n"
        'print(flags.FLAGS.config.data.source, diffusion.__file__)\n'
    )
    folder, path = (ROOT, ROOT) if place == 'checkout' else (tmp_path, site)
    source, imported = run(path, folder, sys.executable, '-c', program, config).split()
    assert source == 'tfds:celeb_a'
    assert pathlib.Path(imported) == path / 'diffusion' / '__init__.py'


def requirements():
    """All requirements of setup.cfg, extras included."""
    parser = configparser.ConfigParser(delimiters='=')
    parser.read(ROOT / 'setup.cfg')
    groups = [parser['options']['install_requires'], *parser['options.extras_require'].values()]
    return [Requirement(line) for group in groups for line in group.split('\n') if line]


@pytest.mark.parametrize('python', PYTHONS)
def test_the_pins_of_the_tests_are_in_the_ranges_of_the_package(python):
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith('#')]
    here = {'python_version': python, 'python_full_version': f'{python}.0'}
    pinned = {canonical(pin): str(pin.specifier) for pin in pins if not pin.marker or pin.marker.evaluate(here)}
    for required in requirements():
        if 'tensorflow' in required.name or required.name == 'importlib_resources':  # of `make prepare` alone
            continue
        version = pinned[canonical(required)].removeprefix('==')
        assert required.specifier.contains(version), f'{required} is pinned to {version}'


def canonical(requirement):
    return requirement.name.lower().replace('_', '-')
