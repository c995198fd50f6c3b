"""Files of arrays that others made: those that NumPy writes are read; pipes, pickles and bombs are errors."""

import contextlib
import io
import os
import zipfile

import numpy as np
import pytest

from diffusion.runtime import npz
from diffusion.runtime.npz import read_npz

ARRAYS = {
    'scalar': np.array(2.5),
    'text': np.array('{"a": 1}'),
    'none': np.zeros((0, 3), np.float32),
    'fortran': np.asfortranarray(np.arange(6).reshape(2, 3)),
    'strided': np.arange(20, dtype=np.uint8)[::3],
    'big endian': np.arange(3, dtype='>f4'),
    'pairs': np.array([(1, 2.0)], [('a', '<i4'), ('b', '<f8')]),
}


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save):
    save(tmp_path / 'a.npz', **ARRAYS)
    found = read_npz(str(tmp_path / 'a.npz'))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert read_npz(str(tmp_path / 'a.npz'), ['scalar', 'absent']).keys() == {'scalar'}


def test_an_array_that_expands_to_far_more_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, 'LARGE', 2**20)
    np.savez_compressed(tmp_path / 'bomb.npz', mu=np.zeros(2**20), sigma=np.eye(2))
    monkeypatch.setattr(zipfile.ZipFile, 'open', lambda *_: pytest.fail('it was read'))
    with pytest.raises(ValueError, match=r'mu\.npy has 8,388,736 bytes in 8,\d\d\d'):
        read_npz(str(tmp_path / 'bomb.npz'))


def test_large_arrays_with_content_may_be_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, 'LARGE', 0)
    noise = np.random.default_rng(0).normal(size=1000)
    np.savez_compressed(tmp_path / 'a.npz', noise=noise)
    np.testing.assert_array_equal(read_npz(str(tmp_path / 'a.npz'))['noise'], noise)


@pytest.mark.parametrize('shape', [(10**12,), (3, 10**6), (-1,)])
def test_a_header_that_declares_more_than_there_is_is_refused(tmp_path, shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {'descr': '<f8', 'fortran_order': False, 'shape': shape})
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as archive:
        archive.writestr('mu.npy', file.getvalue() + bytes(80))
    with pytest.raises(ValueError, match=r'mu\.npy is declared as float64'):
        read_npz(str(tmp_path / 'a.npz'))


@pytest.mark.filterwarnings('ignore:Reading `.npy`')
def test_no_flipped_bit_of_a_header_changes_an_array(tmp_path):
    """One in its shape would leave rows out, for example."""
    array, path = np.arange(1230).reshape(123, 10), tmp_path / 'a.npz'
    np.savez(path, mu=array)
    written = path.read_bytes()
    for place in range(written.index(array.tobytes())):
        flipped = bytearray(written)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with contextlib.suppress(OSError, ValueError):
            np.testing.assert_array_equal(read_npz(str(path))['mu'], array, strict=True)


def test_pickles_pipes_and_damaged_files_are_errors(tmp_path):
    path = str(tmp_path / 'a.npz')
    np.savez(path, objects=np.array([{}], object))
    with pytest.raises(ValueError, match='declared as object'):
        read_npz(path)
    np.savez_compressed(path, mu=np.arange(1000))
    content = (tmp_path / 'a.npz').read_bytes()
    for damaged in (b'', b'nothing', content[:-30], content[:100] + bytes(100) + content[200:]):
        (tmp_path / 'a.npz').write_bytes(damaged)
        with pytest.raises(ValueError, match='damaged'):
            read_npz(path)
    os.remove(path)
    os.mkfifo(path)
    with pytest.raises(OSError, match='not a regular file'):
        read_npz(path)
