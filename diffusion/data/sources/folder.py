"""Pictures in a folder or in a zip file, their splits and their classes."""

import collections
import itertools
import os

from diffusion.data import pictures
from diffusion.data.sources import splits
from diffusion.data.sources.files import File, find
from diffusion.data.sources.source import Source
from diffusion.data.sources.splits import Place


def open_folder(place: str, split: str, data_dir: str = '', max_pixels: int = pictures.MAX_PIXELS) -> Source:
    """Open the pictures of one split of a folder or zip file, in the order of their names.

    The splits are guessed from the names of the folders (`splits.guess`), or a folder is named as the split. If every
    picture lies in a subfolder of its split, the name of that subfolder is its class.

    Args:
        place: path of the folder or zip file; relative paths start at data_dir.
        split: 'train', 'test' or 'validation'; or the path of a folder below `place`, such as 'photos/2020', or
            'train/' for a folder that is not taken for the split of its name; '.' is all pictures.
        data_dir: a folder; '' is the current one.
        max_pixels: larger pictures cannot be read.

    Returns:
        The pictures of the split.

    Raises:
        ValueError: there is no such folder, zip file or split, or it contains no pictures.
    """
    if not place:
        raise ValueError(
            "source 'folder' needs a path to a folder or a zip file: --config.data.source=folder:/path/to/pictures"
        )
    path = os.path.abspath(os.path.join(os.path.expanduser(data_dir), os.path.expanduser(place)))
    found = find(path)
    if not found.files:
        others = f', but {_kinds(found.others)}' if found.others else ''
        suffixes = ' '.join(pictures.suffixes())
        raise ValueError(f'there are no pictures below {path} (by suffix: {suffixes}){others}')
    guessed = splits.guess({file.folder for file in found.files})
    guesses = [guessed[file.folder].split for file in found.files]
    counts = collections.Counter(guesses)
    about = [_about_splits(path, guessed, counts)]

    is_path = split == '.' or '/' in split
    name = None if is_path else splits.named(split, [known for known in counts if known])
    if name:
        places = {folder: at for folder, at in guessed.items() if at.split}
    else:
        name, places = split, splits.below(guessed, split) if split else {}
        if not places:
            raise ValueError(_no_split(split, path, list(filter(None, counts)), about[0]))
    folders = {folder for folder, at in places.items() if at.split == name}
    chosen = [file for file in found.files if file.folder in folders]
    about += splits.replaced(split, name)
    if name not in counts:
        about.append(f'split {split!r} is the folder of that name, with {len(chosen)} pictures')
    shared = _shared(found.files, guesses)
    if shared:
        about.append(f'warning: {shared} pictures for training are held out as well: links lead to the same files')
    if found.others:
        about.append(f'left out, as files of kinds that are not read: {_kinds(found.others)}')

    labels = [places[file.folder].label for file in chosen]
    loose = labels.count(None)
    if 0 < loose < len(labels):
        about.append(f'no labels: {loose} of {len(labels)} pictures in {path} for {name} are not in a class folder')
    # The classes are those of all splits, so that a number means the same class in each.
    everywhere = {places[file.folder].label for file in found.files if file.folder in places}
    classes = None if loose else sorted(label for label in everywhere if label)
    if classes and (absent := set(classes) - set(labels)):
        some = ', '.join(map(repr, sorted(absent)[:5])) + ', …' * (len(absent) > 5)
        about.append(f'warning: {len(absent)} of {len(classes)} classes have no pictures in {name}: {some}')
    numbers = {label: number for number, label in enumerate(classes or ())}
    return Source(
        names=[file.name for file in chosen],
        read=lambda i: found.picture(chosen[i], max_pixels),
        identity=[max_pixels, [file[:3] for file in chosen]],
        label=lambda i: numbers.get(places[chosen[i].folder].label or ''),
        classes=classes,
        encoded=lambda i: found.encoded(chosen[i], max_pixels),
        about=about,
        everywhere=[max_pixels, [file[: 2 if os.path.isdir(path) else 3] for file in chosen]],  # checksums stay
    )


def _about_splits(path: str, guessed: dict[str, Place], counts: collections.Counter[str | None]) -> str:
    """Describe the splits that were found, in one line."""
    roots = {split: sorted({at.root for at in guessed.values() if at.split == split}) for split in counts}
    if any(splits.split_of(part) for split in roots for root in roots[split] for part in root.split('/')):
        found = '; '.join(
            f'{split} has {counts[split]} pictures, in {roots[split][0] or "."}/'
            + f' and {len(roots[split]) - 1} more' * (len(roots[split]) > 1)
            for split in splits.WORDS
            if counts[split]
        )
        hint = ' (--config.data.split=FOLDER trains on another folder)' if counts[None] else ''
        return f'splits of {path}: {found}; outside of them are {counts[None]}{hint}'
    parents = [parent for folder in guessed for parent in itertools.accumulate(folder.split('/'), '{}/{}'.format)]
    similar = sorted((parent for parent in parents if splits.split_of(parent.rpartition('/')[2])), key=len)
    hint = ''
    if similar:
        hint = f' ({similar[0]}/ is taken for a class; --config.data.split={similar[0]}/ trains on it alone)'
    return f'splits of {path}: none is named by a folder, so that train has all {counts.total()} pictures{hint}'


def _shared(files: list[File], guesses: list[str | None]) -> int:
    """Return how many files of the split 'train' are, by links, files of other splits."""
    held_out = {file.inode for file, split in zip(files, guesses, strict=True) if split in splits.HELD_OUT}
    held_out.discard(None)
    return sum(file.inode in held_out for file, split in zip(files, guesses, strict=True) if split == 'train')


def _no_split(split: str, path: str, known: list[str], about: str) -> str:
    if known == ['train'] and split in splits.WORDS:
        return (
            f"there is no folder {split}/ in {path}, so all its pictures are the split 'train'; move the held-out "
            f'pictures to {split}/ and the others to train/, or name another folder there: --config.likelihood.split='
            'FOLDER; the likelihood of the training pictures is --config.likelihood.split=train'
        )
    return (
        f'there is no split {split!r} in {path}, and no folder of that name with pictures. {about}\n'
        "    name a folder of it, or '.' for all:  --config.data.split=FOLDER (training), "
        '--config.likelihood.split=FOLDER (likelihood)'
    )


def _kinds(others: collections.Counter[str]) -> str:
    """Describe the kinds of files: '40 .heic, 3 .txt, 1 without a suffix'."""
    counted = [f'{count} {kind or "without a suffix"}' for kind, count in others.most_common(8)]
    return ', '.join(counted) + f' and {len(others) - 8} more kinds' * (len(others) > 8)
