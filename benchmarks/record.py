"""Store the figures of each machine in results/<machine>.json."""

import json
import os
import platform
import re

import jax

from diffusion.util import versions, write_json

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results')


def machine() -> str:
    """Return the machine's name: the accelerator's, or the processor's architecture and number of cores."""
    device = jax.devices()[0]
    found = f'{platform.machine()} {os.cpu_count()} cores' if device.platform == 'cpu' else device.device_kind
    return re.sub(r'\W+', '-', found.lower())


def store(name: str, result: dict, arguments: str = '', **more_versions: str) -> None:
    """Print the figures of a benchmark, and replace its previous ones in the results of this machine.

    Args:
        name: the module in benchmarks/.
        result: the figures, as JSON.
        arguments: what follows `python -m benchmarks.<name>` in the command, with the space before it.
        more_versions: versions of packages that `diffusion.util.versions` does not name.
    """
    path = os.path.join(RESULTS, f'{machine()}.json')
    whole = {}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            whole = json.load(file)
    command = f'python -m benchmarks.{name}{arguments}'
    whole[name] = {**result, 'versions': versions() | more_versions, 'command': command}
    print(json.dumps(whole[name], indent=2))
    write_json(path, dict(sorted(whole.items())))
