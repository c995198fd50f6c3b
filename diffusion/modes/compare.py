"""--mode=compare RECORD RECORD: the differences of the metrics of two sets of images, and their significance."""

import math
import os
from typing import Any

import numpy as np
import scipy.stats

from diffusion.runtime.npz import read_npz
from diffusion.util import RunError, decimals, read_json, say

# Keys in which two entries must agree, and keys in which their references must agree.
SAME = ('features', 'dialect', 'weights_sha256', 'n')
SAME_REFERENCE = ('images_sha256', 'file_sha256', 'flip', 'count', 'vectors', 'labels_sha256')
SAME_NOISE = ('seed', 'count', 'first_level')  # records that agree in these started from the same noise


def run(paths: list[str]) -> int:
    """Test the difference of each metric that both records have: the first record's value minus the second's.

    If image i of both sets started from the same noise and the influence of each image on a metric is known, the
    standard error is that of pairs; otherwise it is that of independent images.

    Args:
        paths: two files record.json, of --mode=sample or --mode=evaluate, or their folders.

    Returns:
        The exit status, 0.

    Raises:
        RunError: there are not two records, or they cannot be compared; the message names the keys that differ.
    """
    if len(paths) != 2:
        raise RunError(
            f'--mode=compare takes two records, but got {len(paths)}: --mode=compare A/record.json B/record.json'
        )
    paths = [os.path.join(path, 'record.json') if os.path.isdir(path) else path for path in paths]
    records = [_read(path) for path in paths]
    first, second = ({_key(entry): entry for entry in record['metrics']} for record in records)
    both = [key for key in first if key in second]
    unlike = differences([(first[key], second[key]) for key in both if 'label' not in first[key]])
    unlike += other_dialects(*records)
    if not both and not unlike:
        names = (', '.join(dict.fromkeys(name for name, *_ in entries)) or 'nothing' for entries in (first, second))
        raise RunError(f'the records have no number in common: {paths[0]} has {next(names)}, {paths[1]} {next(names)}')
    if unlike:
        lines = ''.join(f'\n    {line}' for line in unlike)
        raise RunError(f'{paths[0]} and {paths[1]} cannot be compared:{lines}')
    paired = all(key in record for record in records for key in SAME_NOISE) and all(
        records[0][key] == records[1][key] for key in SAME_NOISE
    )
    influences = [_influences(path) if paired else {} for path in paths]
    for key in both:
        a, b = first[key], second[key]
        if 'label' in a and (unlike := differences([(a, b)])):
            say(f'{"; ".join(unlike)}: not compared')
            continue
        name = '|'.join(key)
        if all(name in known for known in influences):
            error, how = paired_error(influences[0], influences[1], name), 'paired'
        else:
            error, how = math.hypot(a['standard_error'], b['standard_error']), 'not paired'
        digits = decimals(error)
        values = f'{a["value"]:.{digits}f} − {b["value"]:.{digits}f} = {verdict(a, b, error)}'
        say(f'{_name(a)} ({a["features"]}, {a["dialect"]}): {values}, {how}')
    return 0


def paired_error(first: dict[str, np.ndarray], second: dict[str, np.ndarray], name: str) -> float:
    """Return the standard error of the difference of a metric of two sets of images whose i-th images are a pair.

    It is that of the mean of N differences of influences. If the metric is a mean over random subsets, which are the
    same for both sets, the error of drawing them is added: that of the mean difference of their values.

    Args:
        first: the arrays of influences.npz of the first set.
        second: those of the second set.
        name: of the metric there.
    """
    variance = 0.0
    for key in (name, f'{name}|subsets'):
        if key in first and key in second:
            changes = first[key] - second[key]
            variance += float(np.var(changes, ddof=min(1, len(changes) - 1))) / len(changes)
    return math.sqrt(variance)


def _key(entry):
    """What names a metric: name and dialect, and the label if it is that of a class."""
    return entry['name'], entry['dialect'], *([str(entry['label'])] if 'label' in entry else [])


def _name(entry):
    """A metric in words."""
    return entry['name'] + (f' of class {entry["class"]}' if 'label' in entry else '')


def verdict(a: dict[str, Any], b: dict[str, Any], error: float) -> str:
    """Return the difference of two values, its standard error, and the two-sided p-value of the normal test."""
    difference = a['value'] - b['value']
    p = 2 * scipy.stats.norm.sf(abs(difference) / error) if error else float(difference == 0)
    digits = decimals(error)
    return f'{difference:+.{digits}f} ± {error:.{digits}f}, p = {p:.2g}'


def differences(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Return a line for each key in which two entries must agree but differ."""
    found = []
    for a, b in pairs:
        compared = {key: (a.get(key), b.get(key)) for key in SAME}
        references = (a.get('reference') or {}, b.get('reference') or {})
        compared |= {f'reference.{key}': (references[0].get(key), references[1].get(key)) for key in SAME_REFERENCE}
        # A reference and the file of moments that was made from it are the same: both have the digest of the images.
        if all(reference.get('images_sha256') for reference in references):
            del compared['reference.file_sha256']
        found += [f'{_name(a)}: {key} is {x!r} and {y!r}' for key, (x, y) in compared.items() if x != y]
    return found


def other_dialects(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return a line for each metric that two records have, but in no common dialect."""
    dialects: list[dict[str, list[str]]] = [{}, {}]
    for record, found in zip((first, second), dialects, strict=True):
        for entry in record['metrics']:
            found.setdefault(entry['name'], []).append(entry['dialect'])
    return [
        f'{name}: dialect is {", ".join(dict.fromkeys(dialects[0][name]))} and {", ".join(dict.fromkeys(others))}'
        for name, others in dialects[1].items()
        if name in dialects[0] and not set(others) & set(dialects[0][name])
    ]


def _read(path):
    """Read a record that has metrics."""
    try:
        record = read_json(path)
        _ = [(e['name'], e['dialect'], float(e['value']), float(e['standard_error'])) for e in record['metrics']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f'{path} is no record of --mode=sample or --mode=evaluate ({type(error).__name__}: {error})'
        ) from error
    return record


def _influences(path):
    """The influence of each image on the metrics of a record, where it is known."""
    try:
        return read_npz(os.path.join(os.path.dirname(path), 'influences.npz'))
    except (OSError, ValueError):
        return {}
