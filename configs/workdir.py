"""The config of an existing run, read from its workdir. It is used where --config is left out.

diffusion --workdir=runs/x --mode=sample
"""

import os
from typing import Any

from ml_collections import ConfigDict

from diffusion.configs import default
from diffusion.util import file_of_config, read_json

# These parts of a config, and these keys of any part, belong to a machine or to one command. They are not taken from a
# run, because someone else's run must not determine where files are written.
PARTS_LEFT_OUT = ('command', 'compile_cache', 'distributed')
KEYS_LEFT_OUT = ('accept_other_images', 'begin_again', 'folder', 'step')


def get_config(workdir: str = '') -> ConfigDict:
    workdir = os.path.expanduser(workdir)
    path = file_of_config(workdir)
    if not workdir or not path:
        missing = os.path.join(workdir, 'config.json')
        raise SystemExit(
            f'error: --config=workdir:{workdir}: a workdir must follow the colon, but there is no {missing}'
        )
    config = default.get_config()
    try:
        stored = read_json(path)
        if os.path.basename(path) != 'config.json':
            stored = stored['record']
        if not isinstance(stored, dict):
            raise ValueError(f'it holds {str(stored)[:40]} instead of the keys of a config')
        taken = {part: value for part, value in stored.items() if part in config and part not in PARTS_LEFT_OUT}
        for part, values in taken.items():
            if isinstance(values, dict):
                taken[part] = {key: value for key, value in values.items() if key not in KEYS_LEFT_OUT}
        refuse_other_keys(taken, config, path, stored.get('command'))
        config.update(taken)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise SystemExit(f'error: {path} cannot be read ({error}): restore it, or choose another --workdir') from error
    return config


def refuse_other_keys(taken: dict[str, Any], config: ConfigDict, path: str, command: Any) -> None:
    """Exit with one line if a run has keys that configs/default.py has not: its own config file adds them."""
    others = [
        f'config.{part}.{key}'
        for part, values in taken.items()
        if isinstance(values, dict)
        for key in values
        if key not in config[part]
    ]
    if others:
        made_with = command.get('config') if isinstance(command, dict) else None
        raise SystemExit(
            f'error: {path} has keys that configs/default.py has not: {", ".join(others)}. '
            f'Give the config that adds them: --config={made_with or "FILE.py"}'
        )
