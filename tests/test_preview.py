"""--mode=data: a few files that tell what training would see, within seconds."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import digits, folder
from diffusion import data, experiment, preview
from diffusion.data import sources
from diffusion.experiment import RunError
from diffusion.report.grid import GAP
from tests.galleries import encoded, fill, noise, write_tfds
from tests.test_main import assert_refused, main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def show(workdir, config=None, **changes):
    """What --mode=data writes: the sheet, and the record."""
    config = config or folder.get_config()
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    assert preview.run(config, str(workdir)) == 0
    with Image.open(workdir / 'data' / 'grid.png') as picture:
        sheet = np.asarray(picture)
    return sheet, json.loads((workdir / 'data' / 'record.json').read_text(encoding='utf-8'))


def tiles(sheet, count, size):
    """The images of a sheet, at their own size."""
    columns = int(np.ceil(np.sqrt(count)))
    factor = (sheet.shape[1] - GAP) // columns - GAP
    factor //= size
    step = factor * size + GAP
    corners = [(GAP + i // columns * step, GAP + i % columns * step) for i in range(count)]
    return [sheet[y : y + factor * size : factor, x : x + factor * size : factor] for y, x in corners]


def as_set(images):
    return {np.ascontiguousarray(image).tobytes() for image in images}


@pytest.mark.parametrize('kind', ['folder', 'tfds'])
def test_the_sheet_shows_the_images_and_the_record_describes_them(tmp_path, kind, capsys):
    images = noise(10, 12, 12, 3)
    pictures = [encoded(image) for image in images]
    if kind == 'folder':
        source = f'folder:{fill(tmp_path / "p", {f"{i}.png": picture for i, picture in enumerate(pictures)})}'
    else:
        write_tfds(tmp_path / 'tfds', 'mine', {'train': [(picture, None) for picture in pictures]})
        source = 'tfds:mine'
    where = dict(data__source=source, data__data_dir=str(tmp_path / 'tfds') if kind == 'tfds' else '')
    sheet, record = show(tmp_path / 'run', **where, data__flip=False)
    assert as_set(tiles(sheet, 10, 12)) == as_set(images)
    assert (record['source'], record['count'], record['looked_at'], record['bad']) == (source, 10, 10, 0)
    assert record['shape'] == [12, 12, 3]
    floats = images / 127.5 - 1
    np.testing.assert_allclose(record['channel_means'], floats.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(record['channel_stds'], floats.std((0, 1, 2)), atol=1e-6)
    output = capsys.readouterr().out
    for words in ('10 pictures', '12×12', record['fingerprint'], str(tmp_path / 'run' / 'data' / 'grid.png')):
        assert words in output
    assert not (tmp_path / 'cache').exists()  # nothing is decoded that is not looked at

    config = folder.get_config()
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in where.items()})
    loaded = experiment.load_images(experiment.resolve(config, str(tmp_path / 'run')))
    assert loaded.record['fingerprint'] == record['fingerprint']
    assert as_set(loaded.images) == as_set(images)


def test_half_of_the_images_are_mirrored_as_training_does(tmp_path):
    images = noise(64, 8, 8, 3)
    root = fill(tmp_path / 'p', {f'{i:02d}.png': encoded(image) for i, image in enumerate(images)})
    sheet, _ = show(tmp_path / 'run', data__source=f'folder:{root}')
    shown = as_set(tiles(sheet, 64, 8))
    plain, mirrored = len(shown & as_set(images)), len(shown & as_set(images[:, :, ::-1]))
    assert plain + mirrored == 64 and abs(plain - 32) < 5 * 4  # five standard deviations


def test_a_wrong_crop_is_seen(tmp_path):
    """A face that is bright, where DDIM's crop looks, within a frame that is dark."""
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[57:185, 25:153] = 255
    root = fill(tmp_path / 'p', {'000001.png': encoded(picture)})
    how = dict(data__source=f'folder:{root}', data__image_size=64)
    _, record = show(tmp_path / 'right', **how, data__crop='ddim')
    assert record['channel_means'] == [1] and record['preprocessing']['crop'] == 'ddim'
    _, record = show(tmp_path / 'wrong', **how, data__crop='center')
    assert max(record['channel_means']) < 0.7


def test_not_everything_is_read(tmp_path, monkeypatch):
    """Of a hundred thousand pictures a thousand, from the first to the last, each read once."""
    picture, reads = encoded(noise(1, 8, 8)[0]), []
    many = sources.Source(range(100_000), lambda i: (reads.append(i), (picture, None))[1], None, [])
    monkeypatch.setattr(data, 'open_source', lambda *where: many)
    _, record = show(tmp_path / 'run', data__source='folder:x', data__image_size=8, data__channels=1, model__channels=8)
    assert record['count'] == 100_000 and record['looked_at'] == len(reads) == len(set(reads)) == 1000
    assert min(reads) == 0 and max(reads) == 99_999 and np.ptp(np.diff(sorted(reads))) <= 1


def test_bad_pictures_are_counted_and_named(tmp_path, capsys):
    files = {f'{i}.png': encoded(noise(1, 8, 8)[0]) for i in range(6)} | {'7.png': b'', '8.jpg': b'text'}
    _, record = show(tmp_path / 'run', data__source=f'folder:{fill(tmp_path / "p", files)}')
    assert (record['count'], record['looked_at'], record['bad']) == (8, 8, 2)
    output = capsys.readouterr().out
    assert '2 of them cannot be used (25.0%, which training refuses)' in output
    assert "'7.png' is empty" in output and "'8.jpg' is no picture" in output


def test_pictures_none_of_which_can_be_used_are_an_error(tmp_path):
    root = fill(tmp_path / 'p', {'1.png': encoded(noise(1, 8, 9)[0])})
    with pytest.raises(RunError, match='none of the 1 pictures'):
        show(tmp_path / 'run', data__source=f'folder:{root}', data__crop='')


def test_a_workdir_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / 'data').write_text('not a folder')
    with pytest.raises(RunError, match=r'/data cannot be written to .*--workdir'):
        preview.run(digits.get_config(), str(tmp_path))
    (tmp_path / 'data').unlink()
    (tmp_path / 'data' / 'grid.png').mkdir(parents=True)
    with pytest.raises(RunError, match=r'/data cannot be written to .*make room'):
        preview.run(digits.get_config(), str(tmp_path))


def test_the_digits_at_the_command_line(tmp_path):
    done = main('--config=configs/digits.py', f'--workdir={tmp_path}', '--mode=data')
    assert done.returncode == 0 and '1498 pictures in digits' in done.stdout, done.stderr
    record = json.loads((tmp_path / 'data' / 'record.json').read_text(encoding='utf-8'))
    assert record['count'] == record['looked_at'] == 1498 and record['fingerprint'] == 'digits'
    mean = experiment.load_images(digits.get_config()).images.mean() / 127.5 - 1
    np.testing.assert_allclose(record['channel_means'], [mean], atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data']


def test_a_source_that_is_left_open_is_asked_for(tmp_path):
    done = main('--config=configs/folder.py', f'--workdir={tmp_path}', '--mode=data')
    assert_refused(done, '--config.data.source=folder:/path/to/pictures')
