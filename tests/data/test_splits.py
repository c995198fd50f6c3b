"""Which pictures are trained on, and which are held out: layouts of data sets as people publish them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.data.sources import open_source, splits
from tests.galleries import encoded, fill, noise, write_tfds, zipped

PNG = encoded(noise(1, 8, 8)[0])
CLASSES = ['apple', 'bicycle', 'bus', 'train', 'whale']  # CIFAR-100 has a class called train


def files(*folders, count=2):
    return [f'{folder}/{i}.png'.lstrip('/') for folder in folders for i in range(count)]


def source_of(tmp_path, kind, names):
    contents = dict.fromkeys(names, PNG)
    place = fill(tmp_path / 'p', contents) if kind == 'folder' else zipped(tmp_path / 'p.zip', contents)
    return f'folder:{place}'


def pictures_of(source, split):
    """The names of the pictures of a split, or None if there is no such split."""
    try:
        return list(open_source(source, split).names)
    except ValueError as error:
        assert f'{split}/ in' in str(error) or f'no split {split!r}' in str(error)
        return None


def under(*folders):
    """How many pictures `files` puts into folders, by their order."""
    return sorted(files(*folders))


# Name: (all pictures, those for training, those of the split test).
LAYOUTS = {
    'a class called train': (files(*CLASSES), under(*CLASSES), None),
    'a class called train in a split': (
        files(*(f'{split}/{name}' for split in ('train', 'test') for name in CLASSES)),
        under(*(f'train/{name}' for name in CLASSES)),
        under(*(f'test/{name}' for name in CLASSES)),
    ),
    'capitals': (files('Train/a', 'Test/a'), under('Train/a'), under('Test/a')),
    'gerunds': (files('training', 'testing'), under('training'), under('testing')),
    'sets': (files('training_set/a', 'test_set/a'), under('training_set/a'), under('test_set/a')),
    'sets in sets': (
        files('training_set/training_set/a', 'test_set/test_set/a'),
        under('training_set/training_set/a'),
        under('test_set/test_set/a'),
    ),
    'years': (files('train2017', 'val2017'), under('train2017'), under('val2017')),
    'sizes': (files('train_64x64', 'valid_64x64'), under('train_64x64'), under('valid_64x64')),
    'domains': (
        files('trainA', 'trainB', 'testA', 'testB'),
        under('trainA', 'trainB'),
        under('testA', 'testB'),
    ),
    'two outer folders': (
        files('archive/data/train/a', 'archive/data/test/a'),
        under('archive/data/train/a'),
        under('archive/data/test/a'),
    ),
    'a stray picture above the splits': (
        ['preview.png', *files('data/train', 'data/test')],
        under('data/train'),
        under('data/test'),
    ),
    'train and dev': (files('train', 'dev'), under('train'), under('dev')),
    'train and extra': (files('train', 'extra'), under('extra', 'train'), None),
    'train, test and extra': (files('train', 'test', 'extra'), under('train'), under('test')),
    'one folder, train': (files('train/a', 'train/b'), under('train/a', 'train/b'), None),
    'one folder, test': (files('test/a', 'test/b'), None, under('test/a', 'test/b')),
    'only the held-out pictures have a folder': (files('', 'test'), under(''), under('test')),
    'held-out pictures beside classes': (files('cat', 'dog', 'test'), under('cat', 'dog'), under('test')),
    'held-out pictures beside classes, one of them called train': (
        files(*CLASSES, *(f'test/{name}' for name in CLASSES)),
        under(*CLASSES),
        under(*(f'test/{name}' for name in CLASSES)),
    ),
    'held-out pictures in each class': (
        files('cat', 'cat/test', 'dog', 'dog/test'),
        under('cat', 'dog'),
        under('cat/test', 'dog/test'),
    ),
    'splits in each class': (
        files('cat/train', 'cat/test', 'dog/train', 'dog/test'),
        under('cat/train', 'dog/train'),
        under('cat/test', 'dog/test'),
    ),
    'words that contain the names': (
        files('bullet train', 'contest', 'test tube'),
        under('bullet train', 'contest', 'test tube'),
        None,
    ),
    'no folders': (files(''), under(''), None),
}


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_data_sets(tmp_path, layout, kind):
    every, train, test = LAYOUTS[layout]
    source = source_of(tmp_path, kind, every)
    assert pictures_of(source, 'train') == train
    assert pictures_of(source, 'test') == test


@pytest.mark.parametrize(
    ('name', 'split'),
    [
        *[(name, 'train') for name in ('train', 'TRAIN', 'Training', 'train-images', 'bounding_box_train', 'trainset')],
        *[(name, 'test') for name in ('test', 'Testing_Set', 'eval', 'held-out', 'testData', 'Test (1)')],
        *[(name, 'validation') for name in ('val', 'valid', 'validation', 'dev', 'val2017', 'ValidationSet')],
        *[(name, None) for name in ('', 'trains', 'trainer', 'contest', 'valley', 'train station', 'data', 'images')],
    ],
)
def test_names_of_splits(name, split):
    assert splits.split_of(name) == split


NAMES = st.sampled_from(['train', 'test', 'val', 'cat', 'dog'])
FOLDERS = st.sets(st.lists(NAMES, max_size=3).map('/'.join), min_size=1)


@given(FOLDERS)
def test_outer_folders_and_capitals_do_not_matter(folders):
    found = splits.guess(folders)
    outside = splits.guess({f'archive/data/{folder}'.rstrip('/') for folder in folders})
    capital = splits.guess({folder.upper() for folder in folders})
    for folder, place in found.items():
        assert outside[f'archive/data/{folder}'.rstrip('/')].split == capital[folder.upper()].split == place.split


@given(FOLDERS)
def test_what_lies_in_a_folder_for_test_is_not_trained_on(folders):
    """Unless it has a folder for training in turn, as a folder of tests may have."""
    for folder, place in splits.guess(folders).items():
        named = [part for part in folder.split('/') if splits.split_of(part)]
        if place.split == 'train' and named:
            assert 'train' in named[:2]
        if not any('test' in path or 'val' in path for path in folders):
            assert place.split == 'train'


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_one_line_counts_each_split_and_what_is_outside(tmp_path, kind):
    every = [*files('in/train', count=4), *files('in/val', count=3), *files('in/extra', count=2), 'top.png']
    (line,) = open_source(source_of(tmp_path, kind, every), 'train').about
    assert 'train has 4 pictures, in in/train/; validation has 3 pictures, in in/val/; outside of them are 3' in line
    assert '--config.data.split=FOLDER' in line


def test_the_line_says_if_there_are_no_splits(tmp_path):
    (line,) = open_source(source_of(tmp_path, 'folder', files(*CLASSES)), 'train').about
    assert 'none is named by a folder, so that train has all 10 pictures' in line
    assert 'train/ is taken for a class; --config.data.split=train/ trains on it alone' in line


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_any_folder_can_be_named_as_the_split(tmp_path, kind):
    """Where the guess is wrong."""
    every = files('train', 'extra/a', 'extra/b', 'extras')
    source = source_of(tmp_path, kind, every)
    for split, expected in {
        'train/': under('train'),
        './train': under('train'),
        'extra': under('extra/a', 'extra/b'),
        'extra/b': under('extra/b'),
        '.': sorted(every),
    }.items():
        found = open_source(source, split)
        assert list(found.names) == expected
        assert f'split {split!r} is the folder of that name, with {len(expected)} pictures' in found.about
    assert open_source(source, 'extra').classes == ['a', 'b']
    with pytest.raises(
        ValueError, match=r"no split 'extr' .*train has all 8 pictures(.|\n)*--config.data.split=FOLDER"
    ):
        open_source(source, 'extr')
    with pytest.raises(ValueError, match="no split ''"):
        open_source(source, '')


def test_classes_do_not_include_the_folders_of_the_splits(tmp_path):
    for layout, expected in {
        'two outer folders': ['a'],
        'sets in sets': ['a'],
        'a class called train in a split': CLASSES,
        'splits in each class': ['cat', 'dog'],
        'held-out pictures in each class': ['cat', 'dog'],
    }.items():
        source = source_of(tmp_path / layout, 'folder', LAYOUTS[layout][0])
        assert open_source(source, 'train').classes == open_source(source, 'test').classes == expected


def test_backslashes_in_a_zip_file_separate_folders(tmp_path):
    """As some programs for Windows write them."""
    names = [name.replace('/', '\\') for name in files('p/train/a', 'p/train/b', 'p/test/a')]
    source = open_source(source_of(tmp_path, 'zip', names), 'train')
    assert list(source.names) == files('p/train/a', 'p/train/b') and source.classes == ['a', 'b']
    assert [source.encoded(i) for i in range(4)] == [PNG] * 4


def test_links_into_other_folders_are_followed(tmp_path):
    root = fill(tmp_path / 'p', dict.fromkeys(files('all/cat', 'all/dog'), PNG))
    for split, name in itertools.product(('train', 'test'), ('cat', 'dog')):
        (root / split).mkdir(exist_ok=True)
        if (split, name) != ('test', 'dog'):
            (root / split / name).symlink_to(f'../all/{name}')
    source = open_source(f'folder:{root}', 'train')
    assert list(source.names) == files('train/cat', 'train/dog') and source.classes == ['cat', 'dog']
    assert 'outside of them are 4' in source.about[0]
    assert source.about[1].startswith('warning: 2 pictures for training are held out as well')


def test_training_pictures_that_are_linked_as_test_pictures_are_reported(tmp_path):
    root = fill(tmp_path / 'p', dict.fromkeys(files('train', count=3), PNG))
    (root / 'test').symlink_to('train')
    for split in ('train', 'test'):
        source = open_source(f'folder:{root}', split)
        assert len(source) == 3
        assert any('3 pictures for training are held out as well' in line for line in source.about)


def test_folders_full_of_links_to_each_other_end(tmp_path):
    """Along every path without a repetition, they would be visited 8! times."""
    root = fill(tmp_path / 'p', {f'{i}/a.png': PNG for i in range(8)})
    for one, other in itertools.permutations(range(8), 2):
        (root / str(one) / f'to{other}').symlink_to(root / str(other))
    found = open_source(f'folder:{root}', 'train')
    assert {f'{i}/a.png' for i in range(8)} <= set(found.names) and len(found) <= 8 * 16


def test_the_likelihood_of_pictures_without_a_test_split_names_the_way_out(tmp_path):
    source = source_of(tmp_path, 'folder', files(''))
    with pytest.raises(ValueError, match=r'--config\.likelihood\.split=train'):
        open_source(source, 'test')


def test_splits_of_tfds_are_found_by_similar_names_and_counted(tmp_path):
    one = [(PNG, None)]
    write_tfds(tmp_path, 'mine', {'train': one * 3, 'dev': one * 2, 'extra': one})
    source = open_source('tfds:mine', 'test', str(tmp_path))
    assert len(source) == 2
    assert 'train 3, dev 2, extra 1 pictures' in source.about[0]
    assert len(open_source('tfds:mine', 'extra', str(tmp_path))) == 1
    with pytest.raises(ValueError, match="no split 'other'; it has train, dev, extra"):
        open_source('tfds:mine', 'other', str(tmp_path))
