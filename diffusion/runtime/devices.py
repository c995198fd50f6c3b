"""The devices that JAX uses, and accelerators of the machine that it cannot use."""

import glob
import importlib.util
import os
import re
import sys

import jax

from diffusion.util import RunError, first_line

NVIDIA = ('/dev/nvidia0', '/dev/nvidiactl', '/dev/dxg')  # the last one is that of the Windows Subsystem for Linux
TPU = ('/dev/accel0', '/dev/vfio/0')
DRIVER = '/proc/driver/nvidia/version'
CUDA_13_DRIVER = 580  # the oldest driver for CUDA 13


def start() -> str:
    """Start JAX on its devices, and return their number and kind, such as '2 × cpu'.

    Raises:
        RunError: there are none, for example because JAX_PLATFORMS names a platform that does not exist.
    """
    try:
        devices = jax.devices()
    except Exception as error:  # JAX raises RuntimeError or AssertionError
        asked = f' with JAX_PLATFORMS={os.environ["JAX_PLATFORMS"]}' if os.environ.get('JAX_PLATFORMS') else ''
        raise RunError(
            f'JAX has no device{asked} ({first_line(error)}): unset JAX_PLATFORMS, or install JAX for that platform'
        ) from error
    several = f'{jax.process_count()} hosts, ' if jax.process_count() > 1 else ''
    return f'{several}{len(devices)} × {devices[0].device_kind}'


def unused() -> str | None:
    """Return a warning, with the command that helps, if JAX uses the CPU although there is a GPU or a TPU."""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]  # by JAX_PLATFORMS, or for a plan of other devices
    if jax.default_backend() != 'cpu' or chosen:
        return None
    if _exists(NVIDIA) and os.environ.get('CUDA_VISIBLE_DEVICES', '0') not in ('', '-1'):
        name, platform, plugins = 'AN NVIDIA GPU', 'cuda', ['jax_cuda12_plugin', 'jax_cuda13_plugin']
        extra = 'cuda13' if _driver() >= CUDA_13_DRIVER else 'cuda12'
    elif _exists(TPU):
        name, platform, plugins, extra = 'A TPU', 'tpu', ['libtpu'], 'tpu'
    else:
        return None
    python = sys.executable or 'python'
    if any(importlib.util.find_spec(plugin) for plugin in plugins):
        cure = f'JAX_PLATFORMS={platform} {python} -c "import jax; jax.devices()" shows the reason'
    else:
        cure = f"install JAX for it by {python} -m pip install 'jax[{extra}]=={jax.__version__}'"
    return f'THIS MACHINE HAS {name}, BUT JAX USES THE CPU, which is many times slower: {cure}'


def _exists(paths):
    return any(glob.glob(path) for path in paths)


def _driver() -> int:
    """The major version of NVIDIA's driver; 0 if it is unknown."""
    try:
        with open(DRIVER, encoding='utf-8') as file:
            found = re.search(r'Module.*?\s(\d{3,})\.', file.readline())
    except OSError:
        return 0
    return int(found[1]) if found else 0
