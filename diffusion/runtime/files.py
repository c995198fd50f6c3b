"""Small files, written whole or not at all."""

import json
import os


def write_json(path, value):
    """Write `value` as indented JSON; a reader sees the old file or the new one, never a part."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + '.new', 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write('\n')
    os.replace(path + '.new', path)
