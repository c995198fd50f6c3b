"""What every benchmark says of itself, and where its figures lie."""

import json
import os
import platform

import jax

from diffusion.runtime.files import versions, write_json


def circumstances(command):
    """The machine, the versions and the command that made some figures."""
    return {
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'versions': versions(),
        'command': f'python -m benchmarks.{command}',
    }


def store(name, result):
    """Print the figures, and write them to results/<name>-<backend>.json."""
    result = {**result, 'device': jax.devices()[0].device_kind}
    print(json.dumps(result, indent=2))
    write_json(os.path.join('benchmarks', 'results', f'{name}-{jax.default_backend()}.json'), result)
