"""Malformed and malicious files of PyTorch; tests/peers compares what is read with PyTorch itself."""

import contextlib
import os
import struct
import zipfile

import numpy as np
import pytest

from diffusion.interop.pytorch_file import read_state_dict


def test_a_pipe_is_an_error(tmp_path):
    os.mkfifo(tmp_path / 'model.pth')
    with pytest.raises(ValueError, match=r'model\.pth cannot be read .*not a regular file'):
        read_state_dict(str(tmp_path / 'model.pth'))


@pytest.mark.parametrize('bomb', ['data.pkl', 'data/0'])
def test_compressed_members_are_refused_before_they_are_read(tmp_path, monkeypatch, bomb):
    with zipfile.ZipFile(tmp_path / 'model.pth', 'w') as archive:
        for name in ('data.pkl', 'data/0'):
            archive.writestr(f'model/{name}', bytes(10**6), zipfile.ZIP_DEFLATED if name == bomb else None)
    monkeypatch.setattr(zipfile.ZipFile, 'open', lambda *_: pytest.fail('it was read'))
    with pytest.raises(ValueError, match=f'model/{bomb} in it is compressed, which PyTorch never does'):
        read_state_dict(str(tmp_path / 'model.pth'))


# Parts of pickles.
REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'


def text(word):
    return b'X' + struct.pack('<I', len(word)) + word.encode()


def tensor(offset, shape, strides):
    """A view of the storage 0, 1, 2, 3."""

    def numbers(values):
        return b'(' + b''.join(b'K' + bytes([value]) for value in values) + b't'

    storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'K\x04tQ'
    return REBUILD + b'(' + storage + b'K' + bytes([offset]) + numbers(shape) + numbers(strides) + b'\x89}tR'


def write(path, named, *, before=b'', byte_order='little'):
    """A file of PyTorch with a state dict, given as the pickles of its keys and values, and others before it."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('model/data.pkl', b'\x80\x02' + before + b'}(' + named + b'u.')
        archive.writestr('model/byteorder', byte_order)
        archive.writestr('model/data/0', np.arange(4, dtype='<f4' if byte_order == 'little' else '>f4').tobytes())
    return str(path)


def view(path, offset, shape, strides, **how):
    return write(path, text('w') + tensor(offset, shape, strides), **how)


@pytest.mark.parametrize(
    ('offset', 'shape', 'strides', 'values'),
    [
        (0, (2, 2), (1, 2), [[0, 2], [1, 3]]),
        (1, (3,), (1,), [1, 2, 3]),
        (2, (2, 1), (1, 9), [[2], [3]]),
        (2, (3,), (1,), 'larger than its storage'),
        (0, (2, 2), (1, 3), 'larger than its storage'),
        (0, (5,), (0,), 'repeats its values'),
    ],
)
def test_a_view_stays_within_its_storage(tmp_path, offset, shape, strides, values):
    path = view(tmp_path / 'model.pth', offset, shape, strides)
    if isinstance(values, list):
        np.testing.assert_array_equal(read_state_dict(path)['w'], values)
        return
    with pytest.raises(ValueError, match=values):
        read_state_dict(path)


def test_a_file_of_a_big_endian_machine(tmp_path):
    path = view(tmp_path / 'model.pth', 1, (3,), (1,), byte_order='big')
    np.testing.assert_array_equal(read_state_dict(path)['w'], [1, 2, 3])


def test_many_names_of_one_tensor_take_no_memory(tmp_path):
    """A small file may have any number of them."""
    first = text('a') + tensor(0, (4,), (1,)) + b'q\x01'
    named = first + text('b') + b'h\x01' + text('c') + tensor(2, (2,), (1,))
    tensors = read_state_dict(write(tmp_path / 'model.pth', named))
    assert np.shares_memory(tensors['a'], tensors['b']) and np.shares_memory(tensors['a'], tensors['c'])


@pytest.mark.parametrize('target', [REBUILD, b'ctorch\nFloatStorage\n', b'ccollections\nOrderedDict\n'])
def test_a_file_does_not_change_how_the_next_one_is_read(tmp_path, target):
    """A pickle can set attributes of whatever it refers to: here `array`, the method that returns the values."""
    attribute = b'N}' + text('array') + b'ccollections\nOrderedDict\ns\x86'  # (None, {'array': OrderedDict})
    malicious = view(tmp_path / 'malicious.pth', 0, (4,), (1,), before=target + attribute + b'b0')
    with contextlib.suppress(ValueError):
        read_state_dict(malicious)
    np.testing.assert_array_equal(read_state_dict(view(tmp_path / 'model.pth', 0, (4,), (1,)))['w'], [0, 1, 2, 3])
