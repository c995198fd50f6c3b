"""Memory: what does not fit is refused before it is tried, and what runs out is reported, not waited for."""

import resource
import types

import jax
import jax.numpy as jnp
import pytest

from diffusion.modes import train
from diffusion.runtime import hosts, memory
from diffusion.util import RunError
from tests.runs import tiny
from tests.runtime.common import python


def test_the_memory_of_the_host_is_at_most_that_of_the_machine():
    with open('/proc/meminfo', encoding='ascii') as file:
        kilobytes = int(file.readline().split()[1])
    assert 0 < memory.of_host() <= kilobytes * 1024


def test_the_limits_of_the_process_count(monkeypatch):
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (10**6, -1))
    assert memory.of_host() == 10**6
    device = jax.local_devices()[0]
    if device.platform == 'cpu':
        monkeypatch.setattr(jax, 'local_devices', lambda: [device] * 4)  # which share it
        assert memory.of_device(device) == 10**6 // 4


@pytest.mark.parametrize(
    ('own', 'file'),
    [
        ('0::/job/step\n', 'job/step/memory.max'),
        ('0::/job/step\n', 'job/memory.max'),
        ('0::/\n', 'memory.max'),  # in a container
        ('11:cpu,cpuacct:/\n4:memory:/slurm/job\n0::/user\n', 'memory/slurm/job/memory.limit_in_bytes'),
        ('4:memory:/slurm/job:1/step\n', 'memory/slurm/job:1/memory.limit_in_bytes'),
        ('4:memory:/docker/id\n', 'memory/memory.limit_in_bytes'),  # in a container
    ],
)
def test_the_limits_of_the_job_count(monkeypatch, tmp_path, own, file):
    """In both versions of Linux's control groups, and those of the groups around it."""
    monkeypatch.setattr(memory, 'CGROUPS', str(tmp_path / 'cgroup'))
    monkeypatch.setattr(memory, 'OWN_CGROUPS', str(tmp_path / 'own'))
    machine = memory.of_host()
    (tmp_path / 'own').write_text(own)
    limit = tmp_path / 'cgroup' / file
    limit.parent.mkdir(parents=True)
    limit.write_text('max\n')
    assert memory.of_host() == machine
    limit.write_text('1000000\n')
    assert memory.of_host() == 10**6


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch):
    monkeypatch.setattr(memory, 'of_device', lambda device: 8 * 10**9)
    memory.require(8 * 10**9, 'it', 'nothing')
    memory.require(None, 'it', 'nothing')
    with pytest.raises(RunError, match=r'the step takes 2\.5 TB on each device, but .* has 8\.0 GB: use less'):
        memory.require(25 * 10**11, 'the step', 'use less')


@pytest.mark.parametrize(('stats', 'peak'), [([None], None), ([{'peak_bytes_in_use': n} for n in (3, 7, 5)], 7)])
def test_the_peak_is_that_of_the_fullest_device_if_devices_say(monkeypatch, stats, peak):
    devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, 'local_devices', lambda: devices)
    assert memory.peak() == peak


def test_a_program_takes_its_arguments_results_and_temporaries():
    program = jax.jit(lambda x: jnp.sort(x @ x)[::2]).lower(jnp.zeros((512, 512))).compile()
    assert 1.5 * 2**20 <= memory.of_program(program) <= 8 * 2**20
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros((512, 512))).compile()
    assert 2**20 <= memory.of_program(donated) < 1.5 * 2**20  # the result is in the place of the argument


def test_a_network_that_cannot_fit_is_refused_before_anything_is_read(tmp_path):
    """41 TB, by 2¹⁶ channels; without the check, initialization failed, and training waited for its result for ever."""
    with pytest.raises(RunError, match=r'of this network .* takes .* TB on each device, .*config.model.channels=65536'):
        train.run(tiny({'model.channels': 2**16}), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_result_whose_computation_ran_out_of_memory_is_an_error():
    """Reading it without `fetch` hangs, or aborts the process."""
    done = python(
        'import resource, jax, jax.numpy as jnp\n'
        'from diffusion.runtime import memory, mesh\n'
        'resource.setrlimit(resource.RLIMIT_AS, (2 * 2**32, 2 * 2**32))\n'
        'made = jax.jit(lambda key: (jnp.int32(7), jax.random.normal(key, (2**31,))))(jax.random.key(0))\n'
        'try:\n'
        '    mesh.fetch(made[0])\n'
        'except jax.errors.JaxRuntimeError as error:\n'
        '    print(memory.exhausted(error))\n'
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'out of device memory: 8.6 GB could not be allocated; the device has 8.6 GB\n'


@pytest.mark.parametrize(
    ('error', 'words'),
    [
        (MemoryError('Unable to allocate 2.5 GiB'), 'out of memory on the host: Unable to allocate 2.5 GiB'),
        (MemoryError(), 'out of memory on the host'),
        (
            jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3000000000 bytes.'),
            'out of device memory: 3.0 GB could not be allocated',
        ),
        (
            jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.50GiB.'),
            'out of device memory: 2.7 GB could not be allocated',
        ),
        (
            jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Failed to allocate request for 256.00MiB (268435456B) on'),
            'out of device memory: 268.4 MB could not be allocated',
        ),
        (  # on a TPU, see https://github.com/huggingface/diffusers/issues/8358
            ValueError(
                'RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4.39G. That was not '
                'possible. There are 2.30G free.; (0x0x0_HBM0)'
            ),
            'out of device memory: 4.7 GB could not be allocated',
        ),
    ],
)
def test_running_out_of_memory_is_said_with_what_was_asked_for(error, words):
    assert memory.exhausted(error).startswith(words)
    assert memory.exhausted(ValueError('RESOURCE_EXHAUSTED')) is None


@pytest.mark.parametrize('status', ['RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED'])
def test_what_every_start_would_meet_is_not_blamed_on_other_hosts(monkeypatch, status):
    monkeypatch.setattr(hosts.jax, 'process_count', lambda: 4)
    assert hosts.lost(jax.errors.JaxRuntimeError(f'{status}: something')) is None
    assert hosts.lost(jax.errors.JaxRuntimeError('UNAVAILABLE: connection reset')) is not None
