"""--mode=compare: differences with their errors, and what is refused."""

import json
import re

import numpy as np
import pytest

from diffusion.metrics import frechet
from diffusion.modes import compare
from diffusion.util import RunError
from tests.runs import assert_refused, main


def entry(value, error, **changes):
    reference = {'images_sha256': 'abc', 'flip': False, 'count': 100}
    return {
        'name': 'FD-pixels',
        'features': 'pixels',
        'dialect': '[-1,1]',
        'value': value,
        'standard_error': error,
        'n': 200,
        'weights_sha256': None,
        'reference': reference,
    } | changes


def write(folder, metrics, influences=None, **record):
    """A folder with a record, and perhaps the influences of each image."""
    folder.mkdir(parents=True)
    (folder / 'record.json').write_text(json.dumps({'metrics': metrics} | record), encoding='utf-8')
    if influences is not None:
        np.savez(folder / 'influences.npz', **{'FD-pixels|[-1,1]': influences})
    return str(folder)


def test_independent_errors_add_in_squares(tmp_path, capsys):
    paths = [write(tmp_path / 'a', [entry(5.0, 0.3)]), write(tmp_path / 'b', [entry(4.0, 0.4)])]
    assert compare.run(paths) == 0
    assert '5.0000 − 4.0000 = +1.0000 ± 0.5000, p = 0.046, not paired' in capsys.readouterr().out


def test_images_of_the_same_noise_are_paired(tmp_path, capsys):
    """Equal influences leave no error; those of other seeds or first levels are not paired."""
    influences = np.random.default_rng(0).normal(size=200)
    noise = {'seed': 0, 'count': 200, 'first_level': 1000}
    a = write(tmp_path / 'a', [entry(5.0, 0.3)], influences, **noise)
    b = write(tmp_path / 'b', [entry(4.9, 0.3)], influences + 0.01 * influences[::-1], **noise)
    assert compare.run([a, b]) == 0
    error = float(re.search(r'\+0\.1000+ ± ([\d.]+), p = .*, paired', capsys.readouterr().out)[1])
    assert error == pytest.approx(0.01 * influences.std() / 200**0.5, abs=1e-4)
    for other in ({'seed': 1}, {'first_level': 500}):
        c = write(tmp_path / str(other), [entry(4.9, 0.3)], influences, **noise | other)
        assert compare.run([a, c]) == 0
        assert 'not paired' in capsys.readouterr().out
    assert compare.run([a, a]) == 0
    assert '= +0.0000 ± 0.0000, p = 1, paired' in capsys.readouterr().out


def test_a_class_is_compared_with_the_same_class_alone(tmp_path, capsys):
    """In pairs as well. A class that one record lacks is left out, and so is one of other images."""
    rng, noise = np.random.default_rng(0), {'seed': 0, 'count': 200, 'first_level': 1000}
    of_class = {'label': 3, 'class': 'cat', 'n': 50}
    paths = []
    for name, value in (('a', 5.0), ('b', 4.0)):
        metrics = [entry(value, 0.3), entry(value + 2, 0.4, **of_class)]
        metrics += [entry(9.0, 0.1, **{'label': 4, 'class': 'dog'})] * (name == 'a')
        paths.append(write(tmp_path / name, metrics, rng.normal(size=200), **noise))
        with np.load(tmp_path / name / 'influences.npz') as file:
            np.savez(tmp_path / name / 'influences.npz', **file, **{'FD-pixels|[-1,1]|3': np.ones(200)})
    assert compare.run(paths) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith('FD-pixels (pixels, [-1,1]): 5.0000 − 4.0000')
    assert lines[1].startswith('FD-pixels of class cat (pixels, [-1,1]): 7.0000 − 6.0000 = +1.0000 ± 0.0000')
    for changes, why in (
        ({'n': 40}, 'n is 50 and 40'),
        ({'reference': entry(0, 0)['reference'] | {'labels_sha256': 'x'}}, "reference.labels_sha256 is None and 'x'"),
    ):
        other = write(tmp_path / why, [entry(4.0, 0.3), entry(6.0, 0.4, **of_class | changes)])
        assert compare.run([paths[0], other]) == 0
        whole, of_cats = capsys.readouterr().out.splitlines()
        assert whole.startswith('FD-pixels (pixels') and of_cats == f'FD-pixels of class cat: {why}: not compared'


def test_the_paired_error_covers_the_mean_difference():
    """Two sets of vectors of the same noise: their distances differ far less than two independent ones would."""
    rng = np.random.default_rng(0)
    other, found = (np.zeros(6), np.eye(6)), []
    for _ in range(150):
        noise = rng.normal(size=(300, 6))
        sets = noise * 0.8, noise * 0.8 + 0.1 + 0.05 * rng.normal(size=(300, 6))
        moments = [frechet.moments([vectors]) for vectors in sets]
        changes = [frechet.influence(vectors, own, other) for vectors, own in zip(sets, moments, strict=True)]
        difference = frechet.distance(moments[0], other) - frechet.distance(moments[1], other)
        errors = [frechet.standard_error(change) for change in (changes[0] - changes[1], *changes)]
        found.append((difference, errors[0], np.hypot(*errors[1:])))
    differences, paired, unpaired = np.array(found).T
    assert 135 <= np.sum(np.abs(differences - differences.mean()) < 1.96 * paired) <= 149
    assert unpaired.mean() > 1.3 * paired.mean()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'n': 300}, 'n is 200 and 300'),
        ({'features': 'inception'}, "features is 'pixels' and 'inception'"),
        ({'weights_sha256': 'def'}, "weights_sha256 is None and 'def'"),
        ({'reference': {'images_sha256': 'xyz', 'flip': True, 'count': 100}}, "reference.images_sha256 is 'abc' and"),
        ({'reference': {'images_sha256': 'abc', 'flip': True, 'count': 100}}, 'reference.flip is False and True'),
        ({'dialect': 'other'}, r'FD-pixels: dialect is \[-1,1\] and other'),
        ({'name': 'KD-pixels'}, 'no number in common: .*FD-pixels.*KD-pixels'),
    ],
)
def test_unlike_records_are_refused_with_the_keys_that_differ(tmp_path, changes, words):
    paths = [write(tmp_path / 'a', [entry(5.0, 0.3)]), write(tmp_path / 'b', [entry(4.0, 0.4, **changes)])]
    with pytest.raises(RunError, match=words):
        compare.run(paths)


def test_a_second_dialect_of_one_record_is_left_out(tmp_path, capsys):
    """But a metric that the records have in no common dialect is refused, beside others that they share."""
    other = entry(6.0, 0.3, dialect='other')
    a, b = write(tmp_path / 'a', [entry(5.0, 0.3), other]), write(tmp_path / 'b', [entry(4.0, 0.4)])
    assert compare.run([a, b]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    shared = entry(1.0, 0.1, name='KD-pixels')
    paths = [write(tmp_path / str(i), [shared, one]) for i, one in enumerate((other, entry(4.0, 0.4)))]
    with pytest.raises(RunError, match=r'FD-pixels: dialect is other and \[-1,1\]'):
        compare.run(paths)


def test_a_reference_and_the_file_that_was_made_of_it_are_the_same(tmp_path):
    reference = entry(0, 0)['reference']
    file = {'file': '/x.npz', 'file_sha256': 'f'}
    paths = [write(tmp_path / 'a', [entry(5.0, 0.3)])]
    paths.append(write(tmp_path / 'b', [entry(4.0, 0.4, reference=reference | file)]))
    assert compare.run(paths) == 0
    paths = [write(tmp_path / str(i), [entry(4.0, 0.4, reference=file | {'file_sha256': i})]) for i in range(2)]
    with pytest.raises(RunError, match=r'reference\.file_sha256 is 0 and 1'):
        compare.run(paths)


def test_small_numbers_have_the_digits_of_their_error(tmp_path, capsys):
    paths = [write(tmp_path / 'a', [entry(4.2e-4, 3e-5)]), write(tmp_path / 'b', [entry(3.4e-4, 4e-5)])]
    assert compare.run(paths) == 0
    assert '0.000420 − 0.000340 = +0.000080 ± 0.000050, p = 0.11' in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_line_takes_two_records(tmp_path):
    paths = [write(tmp_path / 'a', [entry(5.0, 0.3)]), write(tmp_path / 'b', [entry(4.0, 0.4)])]
    done = main('--mode=compare', *paths)
    assert done.returncode == 0 and '+1.0000 ± 0.5000' in done.stdout, done.stderr
    assert_refused(main('--mode', 'compare', paths[0], '--config=digits'), '--config=digits', 'takes two records')
    (tmp_path / 'no.json').write_text('{}', encoding='utf-8')
    for paths, words in (([], 'got 0'), ([str(tmp_path / 'no.json')] * 2, 'no.json is no record')):
        with pytest.raises(RunError, match=words):
            compare.run(paths)
