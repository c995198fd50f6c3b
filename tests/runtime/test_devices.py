"""The devices that JAX uses, and those of the machine that it cannot use."""

import sys

import jax
import pytest

from diffusion.runtime import devices, targets
from tests.runs import CONFIG, assert_refused, main


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes this machine one with some device files, and another driver."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: None)
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', None)

    def make(*, gpu=False, tpu=False, driver=''):
        (tmp_path / 'there').touch()
        (tmp_path / 'version').write_text(driver)
        monkeypatch.setattr(devices, 'NVIDIA', (str(tmp_path / ('there' if gpu else 'nowhere')),))
        monkeypatch.setattr(devices, 'TPU', (str(tmp_path / ('there' if tpu else 'nowhere')),))
        monkeypatch.setattr(devices, 'DRIVER', str(tmp_path / 'version'))

    yield make
    jax.config.update('jax_platforms', before)


# The first lines of /proc/driver/nvidia/version on two machines.
OLD = 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n'
NEW = 'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n'


@pytest.mark.parametrize(
    ('there', 'words'),
    [
        (dict(gpu=True, driver=OLD), ('AN NVIDIA GPU', f"{sys.executable} -m pip install 'jax[cuda12]==")),
        (dict(gpu=True, driver=NEW), ('AN NVIDIA GPU', "'jax[cuda13]==")),
        (dict(gpu=True), ('AN NVIDIA GPU', "'jax[cuda12]==")),
        (dict(tpu=True), ('A TPU', "'jax[tpu]==")),
    ],
)
def test_a_device_that_jax_cannot_use_is_named_with_the_command_that_mends_it(machine, there, words):
    machine(**there)
    warning = devices.unused()
    assert 'THIS MACHINE HAS' in warning
    for word in words:
        assert word in warning


def test_a_plugin_that_does_not_start_is_asked_why(machine, monkeypatch):
    machine(gpu=True)
    monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: name == 'jax_cuda12_plugin')
    assert 'JAX_PLATFORMS=cuda' in devices.unused() and 'pip install' not in devices.unused()


def test_nothing_is_said_where_the_cpu_is_all_there_is_or_is_wanted(machine, monkeypatch):
    machine()
    assert devices.unused() is None
    machine(gpu=True)
    with monkeypatch.context() as inner:
        inner.setenv('CUDA_VISIBLE_DEVICES', '')
        assert devices.unused() is None
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert devices.unused() is None


@pytest.mark.parametrize(
    'choose', [lambda: jax.config.update('jax_platforms', 'cpu'), lambda: targets.prepare('h100:8')]
)
def test_nothing_is_said_of_a_gpu_if_the_cpu_is_asked_for_or_other_devices_are_planned_for(machine, choose):
    machine(gpu=True)
    choose()
    assert devices.unused() is None


@pytest.mark.slow
def test_a_platform_that_does_not_exist_is_one_line(tmp_path):
    done = main(CONFIG, f'--workdir={tmp_path / "run"}', JAX_PLATFORMS='cdua')
    assert_refused(done, 'JAX_PLATFORMS=cdua', 'unset JAX_PLATFORMS')
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / 'run').exists()


def test_the_devices_are_counted():
    assert devices.start() == f'{len(jax.devices())} × {jax.devices()[0].device_kind}'
