"""Guesses the split that a folder belongs to, from the names of it and of the folders beside it."""

import collections
import itertools
import re
from collections.abc import Collection
from typing import NamedTuple

# The words that name a split. Other words in a name must be FILLERS, so that a class 'bullet train' is not a split.
WORDS = {
    'train': ('train', 'training', 'trn'),
    'test': ('test', 'testing', 'tst', 'eval', 'evaluation', 'heldout', 'holdout'),
    'validation': ('validation', 'validate', 'valid', 'val', 'dev', 'development'),
}
FILLERS = {
    *('set', 'sets', 'data', 'dataset', 'split', 'part', 'folder', 'seg', 'cropped', 'resized', 'bounding', 'box'),
    *('image', 'images', 'img', 'imgs', 'picture', 'pictures', 'photo', 'photos', 'sample', 'samples'),
}
HELD_OUT = ('test', 'validation')
# The split that is used in place of one that a source does not have.
FALLBACKS = {'test': 'validation'}


class Place(NamedTuple):
    """Where the pictures of a folder belong."""

    split: str | None  # None: outside of all splits
    root: str  # the folder that is the split
    label: str | None  # the class; None for a picture that is in no class folder


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, or None: 'Training_Set', 'trainA' and 'train2017' are 'train'."""
    words = re.findall('[A-Z]?[a-z]+|[A-Z]+', name)
    word = ''.join(word.lower() for word in words if len(word) > 1 and word.lower() not in FILLERS)
    word = re.sub('(set|data)$', '', word)
    return next((split for split, known in WORDS.items() if word in known), None)


def named(wanted: str, known: Collection[str]) -> str | None:
    """Find a split among the known ones by its name.

    Args:
        wanted: the name of the split.
        known: the names of the splits that exist.

    Returns:
        `wanted` if it is known, else the known name that stands for the same split, else that of the split's fallback;
        None if there is none.
    """
    if wanted in known:
        return wanted
    for split in (wanted, FALLBACKS.get(wanted)):
        similar = [name for name in known if split is not None and split_of(name) == split]
        if len(similar) == 1:
            return similar[0]
    return None


def replaced(wanted: str, found: str) -> list[str]:
    """Return a line for the user if the split that was found stands for another than the wanted one."""
    if wanted not in FALLBACKS or split_of(found) != FALLBACKS[wanted]:
        return []
    return [f'there is no split {wanted!r}: {found!r} is used in its place']


def guess(folders: Collection[str]) -> dict[str, Place]:
    """Guess the split of each folder that contains pictures, from the names of the folders.

    Two folders beside each other are splits if one is named as training data and the other as held-out data. They may
    be at any depth, and there may be several pairs; other folders beside them are outside of all splits. Without such a
    pair, folders that are named as held-out data, at any depth, are held out, and everything else is for training: a
    class may be called 'train'.

    Args:
        folders: paths relative to the source, '/'-separated; '' is the source itself.

    Returns:
        {folder: its place}.
    """
    paths = {folder: _parts(folder) for folder in folders}
    children = collections.defaultdict(set)
    for path in paths.values():
        for depth, child in enumerate(path):
            children[path[:depth]].add(child)

    def is_pair(parent: tuple[str, ...]) -> bool:
        found = {child: split_of(child) for child in children[parent]}
        train = {child for child, split in found.items() if split == 'train'}
        others = {child for child, split in found.items() if split is None}
        held_out = [child for child, split in found.items() if split in HELD_OUT]
        classes = {child for folder in held_out for child in children[*parent, folder]}
        # apple/, train/ and test/ beside each other, if test/ has apple/ and train/: 'train' is a class.
        return bool(train and held_out) and not (train & classes and others & classes)

    pairs = {parent for parent in list(children) if is_pair(parent)}
    if not pairs:
        return _without_pairs(paths)
    outer = _common(pairs)
    places = {}
    for folder, path in paths.items():
        depth = next((depth for depth in range(len(path)) if path[:depth] in pairs), -1)
        if depth == -1:
            places[folder] = Place(None, '', None)
            continue
        split = split_of(path[depth])
        inner = depth + 1
        while inner < len(path) and children[path[:inner]] == {path[inner]} and split_of(path[inner]) == split:
            inner += 1  # training_set/training_set/…
        classes = path[len(outer) : depth] + path[inner:]
        places[folder] = Place(split, '/'.join(path[: depth + 1]), classes[0] if classes else None)
    return places


def below(folders: Collection[str], path: str) -> dict[str, Place]:
    """Make one split of a folder and all folders below it.

    Args:
        folders: as in `guess`.
        path: the folder, which is also the name of the split; '.' is the source itself.

    Returns:
        {folder: its place}, without the folders that are not below `path`.
    """
    top = tuple(part for part in path.split('/') if part not in ('', '.'))
    paths = {folder: _parts(folder) for folder in folders}
    return _whole({folder: parts for folder, parts in paths.items() if parts[: len(top)] == top}, path)


def _whole(paths: dict[str, tuple[str, ...]], split: str) -> dict[str, Place]:
    """Place all folders in one split."""
    outer = _common(paths.values())
    return {folder: _place(split, outer, path) for folder, path in paths.items()}


def _without_pairs(paths: dict[str, tuple[str, ...]]) -> dict[str, Place]:
    outer = _common(paths.values())
    only = next(filter(None, map(split_of, reversed(outer))), None)
    if only:  # all pictures are in one folder of this name
        return _whole(paths, only)
    places = _whole(paths, 'train')
    for folder, path in paths.items():
        for depth in range(len(outer), len(path)):
            if split_of(path[depth]) in HELD_OUT:
                classes = path[len(outer) : depth] + path[depth + 1 :]
                root = '/'.join(path[: depth + 1])
                places[folder] = Place(split_of(path[depth]), root, classes[0] if classes else None)
                break
    return places


def _place(split: str | None, root: tuple[str, ...], path: tuple[str, ...]) -> Place:
    """The place of a folder below the split's folder; the first folder below that one is the class."""
    return Place(split, '/'.join(root), path[len(root)] if len(path) > len(root) else None)


def _parts(folder: str) -> tuple[str, ...]:
    return tuple(filter(None, folder.split('/')))


def _common(paths: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all paths start with."""
    first, last = min(paths, default=()), max(paths, default=())
    return tuple(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
