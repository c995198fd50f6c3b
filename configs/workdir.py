"""The config of an existing run, read from its workdir. It need not be one of the configs in this folder.

diffusion --config=workdir:runs/x --workdir=runs/x --mode=sample
"""

import json
import os

from diffusion.configs import default


def get_config(workdir=''):
    path = os.path.join(os.path.expanduser(workdir), 'config.json')
    if not workdir or not os.path.isfile(path):
        raise SystemExit(
            f'error: --config=configs/workdir.py:{workdir}: a workdir must follow the colon, but there is no {path}'
        )
    config = default.get_config()
    try:
        with open(path, encoding='utf-8') as file:
            stored = json.load(file)
        config.update({part: stored[part] for part in config if part in stored})
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SystemExit(f'error: {path} is not a config of this version: {error}') from error
    return config
