"""Records: small files, written whole or not at all."""

import importlib.metadata
import json
import os
import platform


def write_json(path, value):
    """Write `value` as indented JSON; a reader sees the old file or the new one, never a part."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A name that is no Unicode (a lone surrogate, to Python) is written as \udc80, which JSON reads back as it was.
    with open(path + '.new', 'w', encoding='utf-8', errors='backslashreplace') as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write('\n')
    os.replace(path + '.new', path)


def versions():
    """Of what numbers depend on."""
    packages = {package: importlib.metadata.version(package) for package in ('jax', 'flax', 'numpy')}
    return {'python': platform.python_version(), **packages}
