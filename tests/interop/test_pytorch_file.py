"""Files of PyTorch that could block or fill the memory; tests/peers compares what is read with PyTorch itself."""

import os
import zipfile

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
