"""Eight devices compute what one does, hold an eighth of the state, and send each other no more than they must.

What is found in compiled programs holds for any device: XLA splits a program in the same way for all.
"""

import collections
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffusion.runtime import hosts
from diffusion.runtime import mesh as meshes
from tests.hlo import collectives, left_to_eigen, talks_to_host
from tests.runs import ROOT

MESHES = ['8×1', '2×4', '1×8', '8×1, 4 parts', '8×1, for CPUs']


def python(program, *args, **environment):
    """Run a program in a process of its own, in which the project can be imported."""
    return subprocess.run(
        [sys.executable, '-c', program, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def measure(*arguments):
    """What tests/on_eight_devices.py measures."""
    program = [sys.executable, '-m', 'tests.on_eight_devices', *arguments]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module', params=['quick', pytest.param('tiny', marks=pytest.mark.slow)])
def seen(request):
    """Of a network of two layers, and of a U-Net."""
    return measure(request.param)


@pytest.fixture(scope='module')
def economies():
    return measure('tiny', 'economies')['economies']


@pytest.fixture(scope='module')
def runs(seen):
    return seen['agreement']


def test_initial_parameters_are_those_of_one_device(runs):
    """Each device makes its part of them."""
    assert runs['2×4']['initial'] == 0


@pytest.mark.parametrize('mesh', MESHES)
def test_losses_are_those_of_one_device(runs, mesh):
    alone = runs['1×1']['losses']
    assert len(alone) == 10 and alone[-1] < 0.9 * alone[0]  # something is learned
    np.testing.assert_allclose(runs[mesh]['losses'], alone, rtol=1e-5)


KEYS_BIAS = "['mid_attention']['key']['bias']"


@pytest.mark.parametrize('mesh', MESHES)
def test_parameters_are_those_of_one_device(runs, mesh):
    """A bias that has moved little is known less well than the rest.

    No output depends on the bias of the attention's keys. The plain network computes its gradient, so that Adam
    follows the rounding errors; the one for CPUs leaves the bias at zero.
    """
    off = dict(runs[mesh]['params'])
    of_keys = off.pop(KEYS_BIAS, 1)
    assert of_keys == 1 or mesh != '8×1, for CPUs'  # 1: the difference is all that the plain one has
    assert max(off.values()) < 1e-4
    assert np.median(list(off.values())) < 1e-6
    assert sum(value > 1e-5 for value in off.values()) <= 2


@pytest.mark.parametrize('mesh', ['8×1', '2×4'])
def test_images_and_bounds_are_those_of_one_device(runs, mesh):
    assert runs[mesh]['images'] < 1e-5
    assert sorted(runs[mesh]['bound']) == ['consistency', 'prior', 'reconstruction']
    assert max(runs[mesh]['bound'].values()) < 1e-5


@pytest.mark.parametrize('mesh', ['8×1', '2×4'])
def test_metrics_are_those_of_one_device(seen, mesh):
    """Their values and standard errors, although the devices cannot share the images evenly."""
    alone, found = (seen['evaluation'][name] for name in ('1×1', mesh))
    assert list(found) == ['FD-mixed', 'KD-mixed', 'recall-mixed', 'FD-pixels']
    for name, measured in found.items():
        np.testing.assert_allclose(measured, alone[name], rtol=1e-5)
    assert 0 < alone['recall-mixed'][0] < 1


def sizes(run, kind):
    """How often arrays of each number of elements, scalars aside, come out of a kind of collective."""
    return collections.Counter(n for found, arrays, _ in run['collectives'] if found == kind for n in arrays if n > 1)


def has_attention(runs):
    return KEYS_BIAS in runs['8×1']['params']


def parameters(runs):
    return collections.Counter(n for n in runs['1×1']['leaves'].values() if n > 1)


def scales(runs):
    """The sizes of the scales of all norms."""
    return [n for path, n in runs['1×1']['leaves'].items() if path.endswith("['scale']")]


def test_nothing_is_sent_on_one_device(runs):
    assert runs['1×1']['collectives'] == []


@pytest.mark.parametrize('mesh', ['8×1', '8×1, 4 parts'])
def test_data_parallel_steps_reduce_each_gradient_once_and_send_nothing_else(runs, mesh):
    """Also if the gradient is a sum over the parts of a batch: it is reduced after the loop."""
    assert {kind for kind, *_ in runs[mesh]['collectives']} == {'all-reduce'}
    assert sizes(runs[mesh], 'all-reduce') == parameters(runs)
    assert not any(in_loop for *_, in_loop in runs[mesh]['collectives'])


def test_the_network_for_cpus_has_fewer_gradients_to_reduce(runs):
    """Those of the products of attention's matrices, not of the four matrices, and none of the bias of its keys.

    The gradients of a norm's scale and bias are one array.
    """
    assert {kind for kind, *_ in runs['8×1, for CPUs']['collectives']} == {'all-reduce'}
    merged = collections.Counter({8 * 8: 4 - 2, 8: 1} if has_attention(runs) else {})
    expected = parameters(runs) - merged
    for size in scales(runs):
        expected.update({size: -2, 2 * size: 1})
    assert sizes(runs['8×1, for CPUs'], 'all-reduce') == expected


@pytest.mark.parametrize('mesh', ['2×4', '1×8'])
def test_split_parameters_are_gathered_once_and_no_activation_is(runs, mesh):
    assert {kind for kind, *_ in runs[mesh]['collectives']} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    split = collections.Counter(runs[mesh]['split_leaves'])
    assert sizes(runs[mesh], 'all-gather') == split and split


@pytest.mark.parametrize('mesh', ['2×4', '1×8'])
def test_biases_and_scales_are_replicated(runs, seen, mesh):
    """So few values are not worth a message; everything else of this network is split, as fsdp divides its sizes."""
    split = collections.Counter(runs[mesh]['split_leaves'])
    whole = parameters(runs) - split
    assert not split - parameters(runs) and min(split) >= seen['smallest_to_split'] > max(whole)
    assert 8 in whole  # a bias of a convolution
    assert 16 in whole or not has_attention(runs)  # the scale of a norm over twice as many channels


@pytest.mark.parametrize(('mesh', 'fsdp'), [('2×4', 4), ('1×8', 8)])
def test_split_gradients_are_reduced_once(runs, mesh, fsdp):
    """Over the devices that share a state; then, between groups of them, each device's part only."""
    reduced, leaves = sizes(runs[mesh], 'all-reduce'), parameters(runs)
    assert not leaves - reduced
    again = reduced - leaves
    assert not again - collections.Counter(n // fsdp for n in leaves.elements())
    assert not again or fsdp < 8


@pytest.mark.parametrize('mesh', ['1×1', *MESHES])
def test_the_host_stays_out_of_the_step(runs, seen, mesh):
    """The steps ran under jax.transfer_guard('disallow'), which would have ended the program."""
    assert seen['guard_bites'] is True
    assert seen['callback_is_seen'] is True
    assert runs[mesh]['talks_to_host'] is False


@pytest.mark.parametrize('mesh', ['1×1', *MESHES])
def test_the_state_reuses_its_memory(runs, mesh):
    run = runs[mesh]
    assert run['old_is_gone'] is True
    assert run['state_bytes_after'] == run['state_bytes']
    assert run['reused_bytes'] >= 0.99 * run['state_bytes']


def test_batches_of_the_host_are_split_over_the_devices(runs):
    assert runs['8×1, 4 parts']['images_are_split'] == 32 // 8


@pytest.mark.parametrize(('mesh', 'fsdp'), [('8×1', 1), ('2×4', 4), ('1×8', 8)])
def test_each_device_holds_its_part_of_the_state(runs, mesh, fsdp):
    """Of the parameters, their EMA and two moments, in float32."""
    saved = 4 * 4 * sum(runs[mesh]['split_leaves']) * (1 - 1 / fsdp)
    assert runs[mesh]['state_bytes'] == runs['1×1']['state_bytes'] - saved


def test_a_real_state_is_split_and_never_whole(seen):
    found = seen['sharded_state']
    assert found['whole'] == pytest.approx(4 * 4 * 35_746_307, rel=1e-3)  # parameters, EMA, two moments; float32
    assert found['per_device'] <= (1 / 8 + 0.05) * found['whole']
    assert found['init_output'] <= (1 / 8 + 0.05) * found['init_whole']
    assert found['init_output'] + found['init_temp'] < found['init_whole'] / 4


@pytest.mark.slow
def test_remat_saves_memory_and_changes_nothing(economies):
    """With few blocks; benchmarks/scaling.py has the figures of the CIFAR-10 network."""
    kept, temp, off = (economies[key] for key in ('kept', 'temp', 'off'))
    assert kept['remat'] < 0.7 * kept['neither'] and temp['remat'] < 0.7 * temp['neither']
    assert off['remat'] < 1e-5
    assert off['other dropout'] > 0.001  # so the dropout was drawn again as it was


@pytest.mark.slow
def test_bfloat16_saves_memory_and_changes_little(economies):
    kept, temp, off = (economies[key] for key in ('kept', 'temp', 'off'))
    assert kept['both'] < 0.95 * kept['remat'] and temp['both'] < 0.95 * temp['remat']
    assert 1e-5 < off['both'] < 0.02


def test_arrays_go_to_the_devices_and_back(seen):
    found = seen['properties']
    assert found['put'] == [[8, 3], [64, 3]]
    assert found['gathered'] is True


def test_parts_of_a_batch_are_averaged_once_and_each_has_its_own_key(seen):
    """32 parts: the spread of a mean of 32 uniform numbers, known to 2 % from 1,000 of them."""
    found = seen['properties']
    assert np.abs(found['mean_over_parts']).max() < 1e-5
    assert found['spread_of_draws'] == pytest.approx((12 * 32) ** -0.5, rel=0.1)
    assert {kind for kind, *_ in found['sent']} == {'all-reduce'}
    assert sorted(n for _, arrays, _ in found['sent'] for n in arrays) == [3, 1000]


def test_a_state_is_gathered_and_split_again(seen):
    assert seen['properties']['whole'] == {'a': [1024, 3], 'b': [4]}
    assert seen['properties']['like_state'] == {'a': [512, 3], 'b': [4]}


def test_hlo_is_read():
    text = """
%body.1 (p: f32[8]) -> f32[8] {
  %r = (f32[3,8]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %g = bf16[16]{0} all-gather-start(%p), dimensions={0}
  %w = f32[8] while(%p), condition=%cond, body=%body.1
}
"""
    assert collectives(text) == [['all-reduce', [24, 1], True], ['all-gather', [16], False]]
    assert not talks_to_host(text) and talks_to_host('custom_call_target="xla_ffi_python_cpu_callback"')


def test_a_mesh_does_not_depend_on_the_order_in_which_devices_come(seen):
    assert seen['properties']['order'] == list(range(8))


CORES = """
import os, sys
import jax
from diffusion.runtime import mesh

for cores, most, flags in eval(sys.argv[1]):
    os.sched_getaffinity = lambda _: range(cores)
    os.environ['XLA_FLAGS'] = flags
    mesh.use_cores(most)
    print(jax.config.jax_num_cpu_devices)
    if os.environ.get('JAX_NUM_CPU_DEVICES') is None and flags == '':
        jax.config.update('jax_num_cpu_devices', -1)
print(jax.device_count())
"""
TWO_BY_XLA = '--xla_force_host_platform_device_count=2'


@pytest.mark.parametrize(
    ('environment', 'cases', 'set_to', 'devices'),
    [
        (
            {},
            [(1, 100, ''), (5, 100, ''), (64, 100, ''), (5, 3, ''), (5, 0, ''), (5, 100, TWO_BY_XLA)],
            [1, 5, 8, 3, 1, -1],
            2,
        ),
        ({'JAX_NUM_CPU_DEVICES': '3'}, [(5, 100, '')], [3], 3),
    ],
    ids=['not set', 'set by JAX_NUM_CPU_DEVICES'],
)
def test_cores_become_devices(environment, cases, set_to, devices):
    """At most as many as asked for, and as many as are worth it; a number that the user has set is left alone."""
    done = python(CORES, cases, **environment)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == [*set_to, devices]


YNNPACK = 'xla_cpu_experimental_ynn_fusion_type'
DRAW = """
import sys
import jax, numpy as np
from diffusion import build
from diffusion.configs import digits
from diffusion.modes.sample import make_sampler
from diffusion.networks import cpu
from diffusion.schedule import timesteps
from tests.hlo import left_to_eigen

compile = cpu.compile

def compile_and_count(*args, **how):
    program = compile(*args, **how)
    print(len(left_to_eigen(program.compiled.as_text())))
    return program

cpu.compile = compile_and_count
config = digits.get_config()
config.model.implementation = 'cpu'
exp = build.build(config)
rng = np.random.default_rng(0)
leaves, tree = jax.tree.flatten(jax.jit(exp.network.init)(jax.random.key(0)))
params = tree.unflatten([leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])
how = dict(batch_size=200, timesteps=timesteps(1000, 100)[-21:], kind='eps', eta=0.0)
np.save(sys.argv[1], make_sampler(exp, params, (8, 8, 1), **how)(params, 0, 0, 200))
"""


@pytest.mark.slow
def test_two_cpu_devices_draw_what_one_does(tmp_path):
    """With convolutions by Eigen, the first seven of 200 images on each device went wrong after a few steps."""
    drawn = []
    for devices in (1, 2):
        done = python(DRAW, tmp_path / f'{devices}.npy', JAX_NUM_CPU_DEVICES=str(devices))
        assert done.returncode == 0, done.stderr
        drawn.append(np.load(tmp_path / f'{devices}.npy'))
        assert int(done.stdout.splitlines()[-1]) == 0  # convolutions and products left to Eigen
    np.testing.assert_allclose(*drawn, atol=1e-3)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of XLA:CPU')
@pytest.mark.parametrize(('options', 'count'), [({}, 0), ({YNNPACK: 'LIBRARY_FUSION_TYPE_REDUCE'}, 1)])
def test_what_is_left_to_eigen_is_found(options, count):
    """A matrix product is YNNPACK's, unless an option leaves YNNPACK the sums alone."""
    product = jax.jit(lambda a, b: a @ b, compiler_options=options)
    program = product.lower(np.ones((256, 64), np.float32), np.ones((64, 64), np.float32)).compile()
    assert len(left_to_eigen(program.as_text())) == count


# ── On this process's own device ──────────────────────────────────────────────────────────────────────────────────────


def test_a_host_alone_gets_its_own_flag_at_once():
    asked = hosts.AnyHost(meshes.make_mesh())
    assert [asked(flag) for flag in (False, True, False)] == [False, True, False]


class Device:
    """As JAX describes one."""

    def __init__(self, kind='', limit=None, process_index=0, id=0):
        self.device_kind, self.stats = kind, limit and {'bytes_limit': limit}
        self.process_index, self.id = process_index, id

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ('kind', 'peak'),
    [
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H100 NVL', 835.5e12),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),  # a part of it
        ('NVIDIA H200 NVL', None),  # not that of an H200
        ('NVIDIA H800', None),
        ('NVIDIA A100-SXM4-40GB', 312e12),
        ('TPU v4', 275e12),
        ('TPU v4 lite', None),
        ('TPU v5 lite', 197e12),  # not that of a v5
        ('TPU v5p', 459e12),
        ('TPU v6 lite', 918e12),
        ('cpu', None),
        ('Radeon', None),
    ],
)
def test_peak_rates_are_those_that_the_makers_state(kind, peak):
    assert meshes.peak_flops(kind) == peak


def test_the_devices_of_a_host_follow_each_other():
    """Sorted by host, then by id, although ids are spread over the hosts, as on a TPU slice."""
    devices = [Device(process_index=number % 3, id=number) for number in np.random.default_rng(0).permutation(12)]
    found = [(device.process_index, device.id) for device in meshes.by_host(devices)]
    assert found == [(host, number) for host in range(3) for number in range(host, 12, 3)]


def test_what_fits_is_measured_on_the_smallest_device():
    class Mesh:
        local_devices = (Device(limit=16e9), Device(limit=4e9))

    assert meshes.fits(Mesh, 1e9) and not meshes.fits(Mesh, 1.01e9)
    assert meshes.fits(Mesh, 2e9, share=0.5)
    Mesh.local_devices = (Device(),)  # it does not report its memory
    assert meshes.fits(Mesh, 2e9) and not meshes.fits(Mesh, 2.1e9)


def test_a_lone_process_joins_nothing():
    assert jax.process_count() == 1
    assert hosts.lost(TimeoutError('slow')) is None
