"""Where the figures of a machine lie, and what each of them says of itself."""

import json
import os
import platform
import re

import jax

from diffusion.runtime.files import versions, write_json

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results')


def machine():
    """Its name: the accelerator's, or the processor's and the number of its cores."""
    device = jax.devices()[0]
    found = f'{platform.machine()} {os.cpu_count()} cores' if device.platform == 'cpu' else device.device_kind
    return re.sub(r'\W+', '-', found.lower())


def store(name, result, arguments='', **more_versions):
    """Print the figures of benchmark `name`, and put them in the place of its last ones in results/<machine>.json."""
    path = os.path.join(RESULTS, f'{machine()}.json')
    whole = {}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            whole = json.load(file)
    command = f'python -m benchmarks.{name}{arguments}'
    whole[name] = {**result, 'versions': versions() | more_versions, 'command': command}
    print(json.dumps(whole[name], indent=2))
    write_json(path, dict(sorted(whole.items())))
