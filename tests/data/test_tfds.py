"""Datasets that tensorflow-datasets has prepared: read without TensorFlow, and clear messages if they are damaged."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion import data
from diffusion.data import prepare
from diffusion.data.sources import open_source, riegeli
from tests.galleries import encoded, feature, fill, noise, picture_feature, write_records, write_tfds

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = noise(12, 8, 8, 3)
PNG = [encoded(image) for image in IMAGES]
ATTRIBUTES = {
    f'attribute_{i}': feature('Scalar', tensor={'shape': {}, 'dtype': 'int64', 'encoding': 'none'}) for i in range(3)
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def load(source, split='train', **changes):
    return data.load(source, split, **{'image_size': 8, 'channels': 3, **changes})


def error_of(source, split='train', data_dir=''):
    """Return the message of the error that opening a dataset raises."""
    with pytest.raises(ValueError) as error:
        open_source(source, split, data_dir)
    return str(error.value)


def test_celeb_a_is_read_as_tfds_prepares_it(tmp_path):
    """The size is declared, and there are attributes beside the picture; the bytes of the JPEGs are unchanged."""
    pictures = [encoded(image, 'jpeg') for image in noise(3, 218, 178, 3)]
    examples = {'train': [(p, None) for p in pictures], 'validation': [(pictures[0], None)]}
    write_tfds(tmp_path, 'celeb_a', examples, image=picture_feature('218', '178'), extra=ATTRIBUTES, version='2.1.0')
    source = open_source('tfds:celeb_a', 'train', str(tmp_path))
    assert [source.encoded(i) for i in range(3)] == pictures
    assert source.read(2).shape == (218, 178, 3) and source.label(2) is None
    assert source.classes is None and 'celeb_a, train, example 2' in source.names
    assert len(open_source('tfds:celeb_a', 'test', str(tmp_path))) == 1  # the held-out split has another name


def test_features_are_read_as_tfds_writes_them(tmp_path):
    folder = write_tfds(tmp_path, 'mine', {'train': [(PNG[0], 1)]}, classes=['a', 'b'])
    features = {
        'attributes': {'smiling': np.bool_},
        'boxes': tfds.features.Sequence({'box': tfds.features.BBoxFeature()}),
        'image': tfds.features.Image(shape=(8, 8, 3)),
        'label': tfds.features.ClassLabel(names=['a cat', 'a dog']),
        'name': tfds.features.Text(),
    }
    tfds.features.FeaturesDict(features).save_config(str(folder))
    source = open_source('tfds:mine', 'train', str(tmp_path))
    np.testing.assert_array_equal(source.read(0), IMAGES[0])
    assert source.classes == ['a cat', 'a dog'] and source.label(0) == 1


def test_floating_point_values_are_an_error(tmp_path):
    """TFDS stores the four bytes of each in the channels of a PNG file."""
    folder = write_tfds(tmp_path, 'mine', {'train': [(PNG[0], None)]})
    image = tfds.features.Image(shape=(8, 8, 1), dtype=np.float32, encoding_format='png')
    tfds.features.FeaturesDict({'image': image}).save_config(str(folder))
    assert "floating-point values in the feature 'image'" in error_of('tfds:mine', data_dir=str(tmp_path))


def test_labels_that_are_of_no_class_are_none(tmp_path):
    write_tfds(tmp_path, 'mine', {'train': [(PNG[0], label) for label in (1, 2, -1)]}, classes=['a', 'b'])
    source = open_source('tfds:mine', 'train', str(tmp_path))
    assert [source.label(i) for i in range(3)] == [1, None, None]


@pytest.mark.parametrize('labelled', ['train', 'test', 'train test', ''])
def test_splits_with_and_without_classes_are_prepared_together(tmp_path, labelled):
    """TFDS wants the same features of all examples. Those of the training pictures decide."""
    files = {f'{split}/{"a/" if split in labelled else ""}{split}.png': PNG[0] for split in ('train', 'test')}
    root = fill(tmp_path / 'pictures', files)
    features = {'image': tfds.features.Image()}
    if 'train' in labelled:
        features['label'] = tfds.features.ClassLabel(names=open_source(f'folder:{root}', 'train').classes)
    features = tfds.features.FeaturesDict(features)
    for split in ('train', 'test'):
        examples = prepare._examples(open_source(f'folder:{root}', split), 'train' in labelled)
        found = [features.encode_example(example) for _, example in examples]
        assert [example.get('label') for example in found] == [
            (0 if split in labelled else -1) if 'train' in labelled else None
        ]


def test_the_newest_version_is_used(tmp_path):
    for version, image in (('1.9.0', 0), ('1.10.0', 1), ('1.2.0', 2)):
        write_tfds(tmp_path, 'mine', {'train': [(PNG[image], None)]}, version=version)
    (tmp_path / 'mine' / '2.0.0').mkdir()  # an interrupted preparation
    assert open_source('tfds:mine', 'train', str(tmp_path)).encoded(0) == PNG[1]
    assert open_source('tfds:mine:1.2.0', 'train', str(tmp_path)).encoded(0) == PNG[2]
    assert 'mine:1.3.0' in error_of('tfds:mine:1.3.0', data_dir=str(tmp_path))


def test_a_config_of_a_dataset_is_a_folder_below_it(tmp_path, monkeypatch):
    write_tfds(tmp_path, 'lsun/church_outdoor', {'train': [(PNG[0], None)]})
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert open_source('tfds:lsun/church_outdoor', 'train').encoded(0) == PNG[0]


def test_a_missing_dataset_is_named_with_the_two_commands(tmp_path):
    for data_dir in ('', str(tmp_path)):
        message = error_of('tfds:celeb_a', data_dir=data_dir)
        assert 'make prepare DATASET=celeb_a' in message
        assert '--config.data.source=folder:/path/to/pictures' in message
        assert (f'DATA_DIR={tmp_path}' in message and str(tmp_path / 'celeb_a') in message) == bool(data_dir)


def test_other_formats_splits_and_features_are_named(tmp_path):
    one = {'train': [(PNG[0], None)]}
    write_tfds(tmp_path, 'records', one, fileFormat='tfrecord')
    message = error_of('tfds:records', data_dir=str(tmp_path))
    assert 'tfrecord' in message and str(tmp_path / 'records' / '1.0.0') in message and 'make prepare' in message
    write_tfds(tmp_path, 'mine', one)
    message = error_of('tfds:mine', 'test', str(tmp_path))
    assert "no split 'test'" in message and 'train' in message
    write_tfds(tmp_path, 'numbers', one, image=ATTRIBUTES['attribute_0'])
    assert 'no images: its features are image' in error_of('tfds:numbers', data_dir=str(tmp_path))


@pytest.mark.parametrize('damage', ['features', 'info', 'missing'])
def test_a_damaged_dataset_is_named_with_the_way_out(tmp_path, damage):
    folder = write_tfds(tmp_path, 'mine', {'train': [(png, None) for png in PNG]})
    (records,) = folder.glob('*.array_record-*')
    if damage == 'features':
        (folder / 'features.json').unlink()
    elif damage == 'info':
        (folder / 'dataset_info.json').write_text('{"name": "mi')
    else:
        records.unlink()
    message = error_of('tfds:mine', data_dir=str(tmp_path))
    assert str(folder) in message and 'make prepare DATASET=mine' in message


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name', 'type'])
@pytest.mark.parametrize('where', ['picture', 'extra'])
def test_no_module_that_the_files_name_is_imported(tmp_path, monkeypatch, key, where):
    """As tfds.builder_from_directory does."""
    (tmp_path / 'intruder.py').write_text('raise SystemExit("executed")')
    monkeypatch.syspath_prepend(tmp_path)
    other = {key: 'intruder.Image', 'image': {'shape': {'dimensions': ['-1', '-1', '3']}}}
    changes = {'image': other} if where == 'picture' else {'extra': {'other': other}}
    write_tfds(tmp_path, 'mine', {'train': [(PNG[0], None)]}, moduleName='intruder', **changes)
    try:
        np.testing.assert_array_equal(open_source('tfds:mine', 'train', str(tmp_path)).read(0), IMAGES[0])
    except ValueError as error:  # without a class that is known, the dataset cannot be read
        assert 'mine' in str(error)
    assert 'intruder' not in sys.modules


@pytest.mark.parametrize('lengths', [['1000000000000'], ['-1'], ['1', '1'], ['x'], None, ['2000']])
def test_numbers_of_examples_that_the_files_cannot_have_are_errors(tmp_path, lengths):
    folder = write_tfds(tmp_path, 'mine', {'train': [(PNG[0], None)]})
    info = json.loads((folder / 'dataset_info.json').read_text())
    info['splits'][0]['shardLengths'] = lengths
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    if lengths == ['2000']:  # less than its bytes: found when they are read
        source = open_source('tfds:mine', 'train', str(tmp_path))
        with pytest.raises(ValueError, match='cannot be read'):
            source.read(1999)
    else:
        message = error_of('tfds:mine', data_dir=str(tmp_path))
        assert str(folder) in message and 'make prepare DATASET=mine' in message


def test_a_number_of_classes_that_no_memory_holds_is_an_error(tmp_path):
    folder = write_tfds(tmp_path, 'mine', {'train': [(PNG[0], 0)]}, classes=['a'])
    (folder / 'label.labels.txt').unlink()
    path = folder / 'features.json'
    assert open_source('tfds:mine', 'train', str(tmp_path)).classes == ['0']
    path.write_text(path.read_text().replace('"numClasses": "1"', '"numClasses": "1000000000000"'))
    assert '1000000000000 classes' in error_of('tfds:mine', data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ('pattern', 'content'),
    [
        *[(name, None) for name in ('dataset_info.json', 'features.json', 'label.labels.txt', '*.array_record-*')],
        *[(name, text) for name in ('dataset_info.json', 'features.json') for text in ('[' * 10**6, '[]', '1')],
    ],
    ids=lambda value: 'pipe' if value is None else value[:9],
)
def test_files_that_would_block_or_overflow_are_errors(tmp_path, pattern, content):
    folder = write_tfds(tmp_path, 'mine', {'train': [(PNG[0], 0)]}, classes=['a'])
    (path,) = folder.glob(pattern)
    if content is None:
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(content)
    if path.name == 'dataset_info.json' and content is None:
        assert f'no dataset mine prepared in {folder.parent}' in error_of('tfds:mine', data_dir=str(tmp_path))
        return
    message = error_of('tfds:mine', data_dir=str(tmp_path))
    assert str(folder.parent) in message and 'make prepare DATASET=mine' in message


def test_damaged_records_are_bad_pictures(tmp_path):
    folder = write_tfds(tmp_path, 'mine', {'train': [(png, i % 2) for i, png in enumerate(PNG)]}, classes=['a', 'b'])
    (records,) = folder.glob('*.array_record-*')
    content = records.read_bytes()
    damaged = content
    for i in (2, 7):
        assert damaged.count(PNG[i][50:100]) == 1  # noise is not compressed
        damaged = damaged.replace(PNG[i][50:100], bytes(50))
    records.write_bytes(damaged)
    images = load('tfds:mine', data_dir=str(tmp_path), max_bad_fraction=0.9)
    kept = [i for i in range(12) if i not in (2, 7)]
    np.testing.assert_array_equal(images.images, IMAGES[kept])
    np.testing.assert_array_equal(images.labels, np.array(kept) % 2)
    (listed,) = (tmp_path / 'cache').glob('diffusion/*/bad.txt')
    bad = [int(line.partition('example ')[2].split()[0]) for line in listed.read_text().splitlines()]
    assert bad == [2, 7]


OPTIONS = [
    *('group_size:1', 'group_size:7', 'group_size:1000', 'default', 'transpose', 'pad_to_block_boundary:true'),
    *('uncompressed', 'snappy', 'brotli:9,group_size:3', 'zstd:19,window_log:20', 'brotli,transpose,group_size:50'),
]


@pytest.mark.parametrize('options', OPTIONS)
def test_whatever_array_record_writes_is_read(tmp_path, options):
    """Records of all sizes, so that the blocks of 64 KiB end anywhere, also within headers."""
    rng = np.random.default_rng(0)
    records = [rng.bytes(size) for size in (*rng.integers(0, 200, 3000), *rng.integers(0, 2**17, 50), 2**20, 0)]
    path = write_records(tmp_path / 'records', records, options)
    largest = riegeli.largest_chunk(path, 2**30)
    assert (largest == 2**20) if options == 'group_size:1' else (2**20 <= largest <= sum(map(len, records)))
    assert riegeli.largest_chunk(path, largest) == largest
    with pytest.raises(ValueError, match='records has'):
        riegeli.largest_chunk(path, largest - 1)


@pytest.mark.parametrize('count', [1000, 100_000])
def test_a_chunk_takes_a_byte_for_each_record(tmp_path, count):
    """Also one of empty records, which are compressed to far less."""
    path = write_records(tmp_path / 'records', [b''] * count, 'group_size:100000')
    assert riegeli.largest_chunk(path, 2**20) < 1000


@pytest.mark.parametrize('options', ['zstd', 'brotli:1', 'snappy', 'group_size:8,zstd'])
def test_a_record_that_expands_beyond_the_limit_is_refused(tmp_path, options):
    folder = write_tfds(tmp_path, 'mine', {'train': [(PNG[0], None)]})
    (records,) = folder.glob('*.array_record-*')
    bomb = bytes(66 * 2**20)
    write_records(records, [bomb], options)
    assert records.stat().st_size < len(bomb) / 15
    with pytest.raises(ValueError, match='69,206,016 bytes in one chunk of records') as error:
        open_source('tfds:mine', 'train', str(tmp_path), max_pixels=64)
    assert str(folder) in str(error.value) and records.name in str(error.value)


def test_a_changed_header_is_refused(tmp_path):
    folder = write_tfds(tmp_path, 'mine', {'train': [(png, None) for png in PNG]})
    (records,) = folder.glob('*.array_record-*')
    content = records.read_bytes()
    for position in (32, 48, 56, 72, 88, 96):  # sizes and types of the first two chunks
        for changed in (b'\xff' * 8, b'\x80' * 8):
            records.write_bytes(content[:position] + changed + content[position + 8 :])
            message = error_of('tfds:mine', data_dir=str(tmp_path))
            assert records.name in message and 'make prepare DATASET=mine' in message
    for length in (0, 30, 1000, len(content) - 2**16 - 1, len(content) - 1):
        records.write_bytes(content[:length])
        assert records.name in error_of('tfds:mine', data_dir=str(tmp_path))


@pytest.mark.parametrize('kind', ['png', 'jpeg'])
def test_the_limit_on_pixels_is_that_of_other_pictures(tmp_path, kind):
    pictures = [encoded(image, kind) for image in (*noise(1, 20, 20, 3), *noise(1, 20, 21, 3))]
    write_tfds(tmp_path, 'mine', {'train': [(picture, None) for picture in pictures]})
    source = open_source('tfds:mine', 'train', str(tmp_path), max_pixels=400)
    assert source.read(0).shape == (20, 20, 3)
    with pytest.raises(ValueError, match='21×20, which is more than 400 pixels'):
        source.read(1)


def test_reading_imports_no_tensorflow(tmp_path):
    write_tfds(tmp_path, 'mine', {'train': [(png, None) for png in PNG]})
    code = (
        'import sys; from diffusion import data\n'
        'images = data.load("tfds:mine", data_dir=sys.argv[1], image_size=8, channels=3)\n'
        'print(len(images), {"tensorflow", "torch"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith('12 set()\n'), done.stderr


def test_the_command_prepares_a_folder(tmp_path):
    """This needs TensorFlow."""
    pytest.importorskip('tensorflow')
    files = {f'{"test" if i % 3 else "train"}/{"ab"[i % 2]}/{i:02d}.png': PNG[i] for i in range(12)}
    root = fill(tmp_path / 'p', files)
    command = ['-m', 'diffusion.data.prepare', f'folder:{root}', '--name=pets', f'--data_dir={tmp_path / "tfds"}']
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f'--config.data.source=tfds:pets --config.data.data_dir={tmp_path / "tfds"}' in done.stdout, done.stderr
    for split in ('train', 'test'):
        ours = load(f'folder:{root}', split)
        prepared = load('tfds:pets', split, data_dir=str(tmp_path / 'tfds'))
        assert prepared.record == ours.record
        np.testing.assert_array_equal(prepared.labels, ours.labels)
