"""The config of a run, as its workdir holds it; it need not be remembered, nor be in this folder.

python main.py --config=configs/workdir.py:runs/x --workdir=runs/x --mode=sample
"""

import json
import os

from configs import default


def get_config(workdir=''):
    path = os.path.join(os.path.expanduser(workdir), 'config.json')
    if not workdir or not os.path.isfile(path):
        raise SystemExit(
            f'error: --config=configs/workdir.py:{workdir}: after the colon comes a workdir, but {path} is not there'
        )
    config = default.get_config()
    try:
        with open(path, encoding='utf-8') as file:
            stored = json.load(file)
        config.update({part: stored[part] for part in config if part in stored})
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SystemExit(f'error: {path} is no config of this version: {error}') from error
    return config
