"""No result is written through a link: in a stranger's workdir it could name any file of the user."""

import os

import numpy as np
import pytest

from diffusion.modes import export
from diffusion.modes.evaluate import write_found
from diffusion.modes.sample import Drawn, save_npz
from diffusion.report.grid import save_each, save_grid
from diffusion.report.sweep import save_sweep
from diffusion.report.terms import save_terms
from diffusion.runtime.logs import Writer
from diffusion.util import FileLock, exclusive

IMAGES = np.zeros((2, 4, 4, 1), np.uint8)
TERMS = {'posterior': np.random.default_rng(0).normal(size=(5, 3))}


def copy(path):
    source = path.parent / 'source' / path.name
    source.parent.mkdir()
    source.write_text('theirs')
    export.copy(str(source), str(path.parent))


WRITERS = {
    'ledger.json': copy,
    'grid.png': lambda path: save_grid(str(path), IMAGES),
    '000001.png': lambda path: save_each(str(path.parent), IMAGES),
    'terms.png': lambda path: save_terms(str(path), np.array([1, 2, 3]), TERMS),
    'sweep.png': lambda path: save_sweep(str(path), {'FD': {'η = 0': [(10, 1.0, 0.1)]}}),
    'samples.npz': lambda path: save_npz(str(path), IMAGES),
    'influences.npz': lambda path: write_found(str(path.parent), {}, {'influences': {'FD': np.zeros(2)}}, {}),
}


@pytest.fixture
def precious(tmp_path):
    path = tmp_path / 'precious'
    path.write_text('mine')
    return path


@pytest.mark.parametrize('suffix', ['', '.new'])
@pytest.mark.parametrize('name', WRITERS)
def test_a_result_replaces_a_link(tmp_path, precious, name, suffix):
    place = tmp_path / 'results' / name
    place.parent.mkdir()
    place.with_name(name + suffix).symlink_to(precious)
    WRITERS[name](place)
    assert precious.read_text() == 'mine'
    assert place.is_file() and not place.is_symlink()


def test_images_are_not_appended_to_a_link(tmp_path, precious):
    (tmp_path / f'drawn-{"0" * 16}.bin').symlink_to(precious)
    with pytest.raises(OSError, match='symbolic link'):
        Drawn(str(tmp_path), (4, 4, 1), '0' * 64)
    assert precious.read_text() == 'mine'


def test_logs_are_not_appended_to_a_link(tmp_path, precious):
    """Also if it leads nowhere, so that it is not replaced."""
    logs = tmp_path / 'logs'
    logs.mkdir()
    (logs / 'metrics.jsonl').symlink_to(tmp_path / 'absent')
    warnings = []
    Writer(str(logs), step=0, warn=warnings.append)
    assert len(warnings) == 1 and 'symbolic link' in warnings[0]
    assert not (tmp_path / 'absent').exists()


EXTENDED = {
    'drawn images': lambda path: Drawn(str(path.parent), (4, 4, 1), '0' * 64),
    'a lock': lambda path: FileLock(str(path)).acquire(),
    'a lock that is waited for': lambda path: exclusive(str(path), 'waiting').__enter__(),
}


@pytest.mark.parametrize('what', EXTENDED)
def test_a_pipe_that_would_be_extended_is_an_error(tmp_path, what):
    """Opening it for writing would wait for a reader for ever."""
    path = tmp_path / f'drawn-{"0" * 16}.bin'
    os.mkfifo(path)
    with pytest.raises(OSError, match=r'not a regular file|No such device or address'):
        EXTENDED[what](path)
