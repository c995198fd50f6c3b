"""--mode=data: a few files that show what training would see, within seconds."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion import build, workdir
from diffusion.configs import digits, folder
from diffusion.data.sources import SOURCES, Source
from diffusion.modes import data
from diffusion.report.grid import GAP
from diffusion.util import RunError
from tests.galleries import encoded, fill, noise, write_tfds
from tests.runs import CONFIG, assert_refused, dotted, main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def show(path, **changes):
    """Run --mode=data with configs/folder.py. Returns the sheet and the record."""
    config = folder.get_config()
    config.update_from_flattened_dict(dotted(changes))
    assert data.run(config, str(path)) == 0
    with Image.open(path / 'data' / 'grid.png') as picture:
        sheet = np.asarray(picture)
    return sheet, json.loads((path / 'data' / 'record.json').read_text(encoding='utf-8'))


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
    assert not (tmp_path / 'cache').exists()  # only the pictures that are examined are decoded

    config = folder.get_config()
    config.update_from_flattened_dict(dotted(where))
    loaded = build.load_images(workdir.resolve(config, str(tmp_path / 'run')))
    assert loaded.record['fingerprint'] == record['fingerprint']
    assert as_set(loaded.images) == as_set(images)


def test_moments_of_counts_are_those_of_the_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    floats = images / 127.5 - 1
    mean, std = data.moments(images)
    np.testing.assert_allclose(mean, floats.mean((0, 1, 2)), atol=1e-7)
    np.testing.assert_allclose(std, floats.std((0, 1, 2)), atol=1e-7)


def test_half_of_the_images_are_mirrored_as_in_training(tmp_path):
    images = noise(64, 8, 8, 3)
    root = fill(tmp_path / 'p', {f'{i:02d}.png': encoded(image) for i, image in enumerate(images)})
    sheet, _ = show(tmp_path / 'run', data__source=f'folder:{root}')
    shown = as_set(tiles(sheet, 64, 8))
    plain, mirrored = len(shown & as_set(images)), len(shown & as_set(images[:, :, ::-1]))
    assert plain + mirrored == 64 and abs(plain - 32) < 5 * 4  # five standard deviations


def test_a_wrong_crop_shows_in_the_record(tmp_path):
    """The picture is bright within DDIM's crop, and dark around it."""
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[57:185, 25:153] = 255
    root = fill(tmp_path / 'p', {'000001.png': encoded(picture)})
    how = dict(data__source=f'folder:{root}', data__image_size=64)
    _, record = show(tmp_path / 'right', **how, data__crop='ddim')
    assert record['channel_means'] == [1] and record['preprocessing']['crop'] == 'ddim'
    _, record = show(tmp_path / 'wrong', **how, data__crop='center')
    assert max(record['channel_means']) < 0.7


def test_a_sample_of_the_pictures_is_read(tmp_path, monkeypatch):
    """A thousand of a hundred thousand, from the first to the last, each once."""
    picture, reads = noise(1, 8, 8, 1)[0], []
    many = Source(names=range(100_000), read=lambda i: (reads.append(i), picture)[1], identity=[])
    monkeypatch.setitem(SOURCES, 'many', lambda place, split, data_dir: many)
    _, record = show(tmp_path / 'run', data__source='many', data__image_size=8, data__channels=1, model__channels=8)
    assert record['count'] == 100_000 and record['looked_at'] == len(reads) == len(set(reads)) == 1000
    assert min(reads) == 0 and max(reads) == 99_999 and np.ptp(np.diff(sorted(reads))) <= 1


def test_bad_pictures_are_counted_and_named(tmp_path, capsys):
    files = {f'{i}.png': encoded(noise(1, 8, 8)[0]) for i in range(6)} | {'7.png': b'', '8.jpg': b'text'}
    _, record = show(tmp_path / 'run', data__source=f'folder:{fill(tmp_path / "p", files)}')
    assert (record['count'], record['looked_at'], record['bad']) == (8, 8, 2)
    output = capsys.readouterr().out
    assert '2 of them cannot be used (25.0%, so training will refuse them)' in output
    assert "'7.png' is empty" in output and "'8.jpg' is not a picture" in output


def test_a_folder_without_a_usable_picture_is_refused(tmp_path):
    root = fill(tmp_path / 'p', {'1.png': encoded(noise(1, 8, 9)[0])})
    with pytest.raises(RunError, match='none of 1 pictures'):
        show(tmp_path / 'run', data__source=f'folder:{root}', data__crop='')


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'data').write_text('not a folder')
    with pytest.raises(RunError, match=r'/data cannot be written .*--workdir'):
        data.run(digits.get_config(), str(tmp_path))
    (tmp_path / 'data').unlink()
    (tmp_path / 'data' / 'grid.png').mkdir(parents=True)
    with pytest.raises(RunError, match=r'/data cannot be written .*free some space'):
        data.run(digits.get_config(), str(tmp_path))


def test_the_digits(tmp_path, capsys):
    assert data.run(digits.get_config(), str(tmp_path)) == 0
    assert '1498 pictures in digits' in capsys.readouterr().out
    record = json.loads((tmp_path / 'data' / 'record.json').read_text(encoding='utf-8'))
    loaded = build.load_images(digits.get_config())
    assert (record['count'], record['looked_at']) == (1498, 1000)
    assert record['fingerprint'] == loaded.record['fingerprint']
    np.testing.assert_allclose(record['channel_means'], [loaded.images.mean() / 127.5 - 1], atol=0.01)  # of a sample
    assert [path.name for path in tmp_path.iterdir() if path.name != 'cache'] == ['data']


@pytest.mark.slow
def test_the_mode_at_the_command_line(tmp_path):
    done = main(CONFIG, f'--workdir={tmp_path}', '--mode=data')
    assert done.returncode == 0 and str(tmp_path / 'data' / 'grid.png') in done.stdout, done.stderr


@pytest.mark.slow
def test_a_source_that_is_left_open_is_asked_for(tmp_path):
    done = main('--config=configs/folder.py', f'--workdir={tmp_path}', '--mode=data')
    assert_refused(done, '--config.data.source=folder:/path/to/pictures')
