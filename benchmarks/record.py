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


def processor() -> str:
    """Return the model of the processor, and its widest vector instructions, where Linux tells."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            first = file.read().split('\n\n')[0]
    except OSError:
        return platform.processor()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in first.splitlines())}
    instructions = about.get('flags', '').split()
    widest = next((name for name in ('avx512f', 'avx2', 'avx') if name in instructions), '')
    numbers = [f'{key} {about[name]}' for key, name in (('family', 'cpu family'), ('model', 'model')) if name in about]
    return ', '.join(filter(None, [about.get('model name', ''), *numbers, widest]))


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
    about = {'processor': processor(), 'versions': versions() | more_versions, 'command': command}
    whole[name] = {**result, **about}
    print(json.dumps(whole[name], indent=2))
    write_json(path, dict(sorted(whole.items())))
