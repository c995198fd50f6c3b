"""Files of PyTorch that could block or fill the memory; tests/peers compares what is read with PyTorch itself."""

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


def view(path, offset, shape, strides):
    """A file of PyTorch with one tensor, 'w', a view of the storage 0, 1, 2, 3."""

    def text(word):
        return b'X' + struct.pack('<I', len(word)) + word.encode()

    def numbers(values):
        return b'(' + b''.join(b'K' + bytes([value]) for value in values) + b't'

    storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'K\x04tQ'
    arguments = storage + b'K' + bytes([offset]) + numbers(shape) + numbers(strides) + b'\x89}'
    pickled = b'\x80\x02}' + text('w') + b'ctorch._utils\n_rebuild_tensor_v2\n(' + arguments + b'tRs.'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('model/data.pkl', pickled)
        archive.writestr('model/data/0', np.arange(4, dtype='<f4').tobytes())
    return str(path)


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
