"""--mode=plan: programs compiled for devices that are not here, against what is known of them."""

import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from diffusion import build
from diffusion.modes import plan
from diffusion.networks import Program
from diffusion.runtime import mesh, targets
from diffusion.util import RunError
from tests.runs import CONFIG, QUICK, ROOT, flags, main, quick, tiny

TINY = (
    '--config.model.channels=8',
    '--config.model.groups=4',
    '--config.model.multipliers=(1,2)',
    '--config.model.attention_resolutions=(4,)',
    '--config.sample.num_steps=4',
    '--config.likelihood.num_steps=4',
)
COMPILERS = {
    'h100': ('jax_cuda13_plugin', 'jax_cuda12_plugin'),
    'tpu-v5e': ('libtpu',),
}


def planned(folder, target, *keys, config=CONFIG):
    """The record of a plan."""
    done = main(config, f'--workdir={folder}', '--mode=plan', f'--config.plan.target={target}', *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    record = next((folder / 'plan').glob('*.json'))
    assert record.with_suffix('.md').read_text(encoding='utf-8') in done.stdout
    return json.loads(record.read_text(encoding='utf-8'))


def needs_compiler(target):
    if not any(map(importlib.util.find_spec, COMPILERS[target.partition(':')[0]])):
        pytest.skip('its compiler is not installed: make test-plan')


@pytest.mark.slow
def test_a_plan_of_this_machine(tmp_path):
    """Arithmetic, memory and kernels of all programs; no messages, and no rate, as that of a CPU is not known."""
    keys = flags(tmp_path, QUICK, sample__num_steps=4)[2:]
    record = planned(tmp_path, 'here', *keys, config=QUICK)
    assert set(record['programs']) == {'train', 'sample', 'likelihood'} and record['device']['flops_per_second'] is None
    for found in record['programs'].values():
        assert found['fits'] and found['collectives'] == {} and found['bound']['seconds'] is None
        assert found['kernels'] > 0 and found['peak_bytes'] >= sum(found['memory'].values()) - 1


CARD = targets.Card('NVIDIA H100 80GB HBM3', 1000, 10, 4, '', {})


def measured(function, what='train', **changes):
    """What is found of a program of three images that does 3·989 TFLOP."""
    config = quick({key.replace('__', '.'): value for key, value in changes.items()})
    program = Program(jax.jit(function).lower(jnp.ones((8, 8))).compile(), 3 * 989e12)
    exp = types.SimpleNamespace(mesh=mesh.make_mesh(devices=jax.devices()[:1]))
    return plan.measure(lambda config, exp: (program, 3), config, exp, CARD, what)


def test_traffic_of_the_memory_is_not_known_of_a_program_with_a_loop():
    """XLA counts the body of a loop as if it ran once."""
    assert measured(lambda x: jnp.sin(x))['bytes_accessed'] == 2 * 8 * 8 * 4
    looped = measured(lambda x: jax.lax.fori_loop(0, 1000, lambda _, y: jnp.sin(y @ x), x))
    assert looped['bytes_accessed'] is None and looped['bound']['memory'] is None and looped['bound']['seconds'] == 3


def test_a_solver_whose_steps_are_not_known_has_no_bound():
    known = measured(jnp.sin, 'likelihood', likelihood__quantities=('posterior', 'flow'))
    assert known['of'] == 'posterior' and known['bound']['seconds'] == 3 and known['bound']['images_per_second'] == 1
    flow = measured(jnp.sin, 'likelihood', likelihood__quantities=('flow',))
    assert 'one step of its solver' in flow['of'] and flow['flops_per_image'] == 989e12
    assert flow['bound']['seconds'] is None and flow['bound']['images_per_second'] is None


def test_the_parts_of_a_step_are_said():
    assert measured(jnp.sin, train__accumulate=4)['of'] == 'one step in 4 parts'


def test_parameters_are_four_bytes_each():
    exp = build.build(quick(), jax.devices()[:1])
    count = sum(leaf.size for leaf in jax.tree.leaves(exp.abstract_state().params))
    state = plan.state_bytes(exp)
    assert state['parameters'] == state['EMA'] == 4 * count and state['optimizer'] == pytest.approx(8 * count, abs=64)


@pytest.mark.parametrize('quantities', [(), ('flaw',)])
def test_unknown_quantities_are_refused(tmp_path, quantities):
    config = quick({'likelihood.quantities': quantities, 'plan.programs': ('likelihood',)})
    with pytest.raises(RunError, match=r'config\.likelihood\.quantities is .* of .*flow'):
        plan.run(config, str(tmp_path))


@pytest.mark.parametrize(
    ('asked', 'fits', 'found', 'tried'),
    [
        (16, 100, (96, True), [16, 32, 64, 128, 96, 112, 104]),
        (16, 15, (8, True), [16, 8]),
        (16, 0, (0, True), [16, 8]),
        (2**15, 2**20, (2**16, False), [2**15, 2**16]),
        (2**17, 2**20, (2**17, False), [2**17]),
        (2**17, 2**16, (2**16, True), [2**17, 2**16, 2**16 + 2**15, 2**16 + 2**14, 2**16 + 2**13]),
    ],
)
def test_the_largest_batch_is_found_by_bisection(monkeypatch, asked, fits, found, tried):
    """In units of eight images, to an eighth of it; nothing is said of batches that are not tried."""
    batches = []

    def measure(compile_program, config, exp, card, what):
        batches.append(config.train.batch_size)
        return {'fits': config.train.batch_size <= fits}

    monkeypatch.setattr(plan, 'measure', measure)
    config = quick({'train.batch_size': asked, 'train.accumulate': 8})
    exp = types.SimpleNamespace(mesh=mesh.make_mesh(devices=jax.devices()[:1]))
    assert plan.largest_batch(config, exp, CARD) == dict(zip(('images', 'complete'), found, strict=True))
    assert batches == tried
    assert ('were not tried' in plan.describe_largest(*found)) == (not found[1])


def test_the_largest_batch_is_not_known_where_the_memory_is_not():
    unknown = targets.Card('Radeon', None, None, None, '', {})
    found = plan.largest_batch(quick(), None, unknown)
    assert found['images'] is None and 'the memory of the device is not' in plan.describe_largest(**found)


def test_what_the_config_leaves_open_is_chosen_for_the_devices_of_the_target(monkeypatch, tmp_path):
    def resolve(config, path, *, platform):
        raise RunError(platform)

    monkeypatch.setattr(targets, 'devices', lambda target: [types.SimpleNamespace(platform='gpu')])
    monkeypatch.setattr(plan.workdir, 'resolve', resolve)
    with pytest.raises(RunError, match=r'^gpu$'):
        plan.run(quick(), str(tmp_path))


def test_an_interrupted_plan_goes_on_with_the_next_program(monkeypatch, tmp_path):
    compiled, stop_at = [], 'likelihood'

    def measure(compile_program, config, exp, card, what):
        if what == stop_at:
            raise KeyboardInterrupt
        compiled.append(what)
        return dict.fromkeys(plan.UNKNOWN) | {'of': what, 'fits': False, 'why': 'it is too large'}

    monkeypatch.setattr(plan, 'measure', measure)
    with pytest.raises(KeyboardInterrupt):
        plan.run(quick(), str(tmp_path))
    assert compiled == ['train', 'sample'] and not list(tmp_path.glob('plan/*.json'))
    stop_at = None
    assert plan.run(quick(), str(tmp_path)) == 0
    assert compiled == ['train', 'sample', 'likelihood']
    (record,) = tmp_path.glob('plan/*.json')
    assert list(json.loads(record.read_text(encoding='utf-8'))['programs']) == compiled
    assert {file.suffix for file in record.parent.iterdir()} == {'.json', '.md'}
    assert plan.run(quick(), str(tmp_path)) == 0
    assert compiled[3:] == ['train', 'sample', 'likelihood']  # a finished plan is made anew


def test_an_alternative_that_does_not_divide_the_batch_is_said_to_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(plan, 'measure', lambda *arguments: {})
    config = quick({'train.batch_size': 1})
    found = plan.alternatives(config, build.build(config, jax.devices()[:1]), CARD)
    assert {row['change'] for row in found} == {'model.remat=True', 'model.dtype=bfloat16'}
    assert 'train.accumulate=2 is left out: config.train.batch_size is 1' in capsys.readouterr().out


def test_plans_of_other_settings_are_other_files_that_name_them(tmp_path):
    """Also if target, batch and dtype are the same."""
    changes = ({}, {'schedule.T': 5}, {'sample.num_steps': 2}, {'plan.programs': ('likelihood',)}, {})
    for change in changes:
        config = quick({'plan.programs': (), **change})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, 'measure', lambda *arguments: REFUSED)
            assert plan.run(config, str(tmp_path)) == 0
    records = [json.loads(path.read_text(encoding='utf-8')) for path in (tmp_path / 'plan').glob('*.json')]
    assert len(records) == len(changes) - 1 and len(list((tmp_path / 'plan').glob('here-fsdp1-batch16-*.md'))) == 4
    for part, key in (('schedule', 'T'), ('sample', 'eta'), ('likelihood', 'quantities'), ('train', 'loss')):
        assert all(key in record[part] for record in records)
    assert all('folder' not in record[part] for record in records for part in ('plan', 'sample', 'likelihood'))


REFUSED = dict.fromkeys(plan.UNKNOWN) | {'of': 'one step', 'fits': False, 'why': 'RESOURCE_EXHAUSTED'}


@pytest.mark.parametrize(('usable', 'said'), [(None, 'its memory is not known'), (12e9, '12.0 GB of memory can be')])
def test_what_is_not_known_is_not_zero(usable, said):
    record = {
        'target': 'here', 'devices': 1, 'hosts': 1, 'device': {'kind': 'Radeon', 'usable_bytes': usable},
        'state_bytes': {'parameters': 4}, 'programs': {'train': REFUSED}, 'alternatives': [], 'largest_batch': None,
        'host': {'disk': 0, 'waiting': 0},
    }  # fmt: skip
    first = plan.markdown(record).splitlines()[0]
    assert said in first and '0.0 kB of memory' not in first


@pytest.mark.parametrize(
    ('shards', 'cache', 'disk'),
    [
        (1, True, 49.152e9),
        (64, True, 6.144e9),
        (64, False, 0),
        (4, True, 12.288e9),
        (12, True, 2 * 4.096e9),
        (0, True, 6.144e9),
    ],
)
def test_what_images_take_on_each_host(shards, cache, disk):
    """Of a million images of 128×128×3 on eight hosts; and 16 batches of 256 wait in memory, an eighth on each.

    A host of eight has one of four shards, which it shares with another host; or two of twelve, one of them shared. If
    the number is open, so many images are divided into 64.
    """
    config = tiny({'data.image_size': 128, 'data.channels': 3, 'data.shards': shards, 'data.cache': cache})
    config.train.batch_size = 256
    found = plan.on_each_host(config, 8)
    assert found == {'disk_bytes_of_a_million_images': disk, 'memory_bytes_of_batches': 16 * 32 * 128 * 128 * 3}


@pytest.mark.parametrize(
    ('target', 'said'),
    [
        ('h100', 'after h100 comes the number of GPUs on a host'),
        ('h100:x', 'after h100 comes'),
        ('tpu-v5e:8', 'after tpu-v5e comes the slice of the TPU: tpu-v5e:2x4'),
        ('h1000:8', "must be 'here' or begin with one of a100-40, a100-80, h100, h200, b200, tpu-v2"),
    ],
)
def test_unknown_targets_are_refused_with_those_that_are_known(target, said):
    with pytest.raises(RunError, match=r'config\.plan\.target') as error:
        targets.prepare(target)
    assert said in str(error.value)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(RunError, match=r"the compiler for NVIDIA H100 .* pip install '.\[plan\]'"):
        targets.devices('h100:8')


def test_the_bound_is_the_longer_of_arithmetic_and_links():
    """A card of 100 FLOP/s, 10 bytes/s of memory and 4 of links; two devices send all that they reduce, and half of
    what they gather."""
    card = targets.Card('NVIDIA none', 1000, 10, 4, '', {})
    found = {'images': 6, 'flops_per_device': 300, 'bytes_accessed': 50, 'collective_bytes': 8}
    found['collectives'] = {'all-reduce': {'count': 1, 'bytes': 8}}

    class Fast(targets.Card):
        flops = 100

    card = Fast(card.kind, card.memory, card.bandwidth, card.link, '', {})
    assert plan.bound(found, card, 2) == {
        'arithmetic': 3, 'memory': 5, 'links': 2, 'seconds': 3, 'sum': 10, 'images_per_second': 2, 'utilisation': 1
    }  # fmt: skip
    assert plan.bound(found | {'collective_bytes': 8 + 16}, card, 2)['links'] == 4
    assert plan.bound(found | {'bytes_accessed': None}, card, 1)['sum'] is None


DEVICES = """
import os, sys
from diffusion.runtime import targets
os.environ.update(targets.prepare(sys.argv[1]))
for target in sys.argv[1:]:
    devices = targets.devices(target)
    print(target, len(devices), len({device.process_index for device in devices}), devices[0].device_kind)
"""
KNOWN = {  # {target: its devices, hosts, and a part of their kind}
    'a100-40:8': (8, 1, 'A100-SXM4-40GB'),
    'a100-80:8x2': (16, 2, 'A100-SXM4-80GB'),
    'h100:8': (8, 1, 'H100'),
    'h200:1': (1, 1, 'H200'),
    'b200:8': (8, 1, 'B200'),
    'tpu-v2:2x2': (8, 1, 'TPU v2'),
    'tpu-v3:4x4': (32, 4, 'TPU v3'),
    'tpu-v4:2x2x1': (4, 1, 'TPU v4'),
    'tpu-v5e:4x4': (16, 4, 'TPU v5 lite'),
    'tpu-v5p:2x2x1': (4, 1, 'TPU v5'),
    'tpu-v6e:2x2': (4, 1, 'TPU v6 lite'),
    'tpu-7x:2x2x1': (8, 1, 'TPU7x'),
}


def test_every_card_has_the_devices_that_its_target_says():
    """Also while another process plans."""
    for name in COMPILERS:
        needs_compiler(name)
    assert {target.partition(':')[0] for target in KNOWN} == set(targets.CARDS)
    command = [sys.executable, '-c', DEVICES, *KNOWN]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for printed, errors in [process.communicate(timeout=300) for process in both]:
        for line, (target, (devices, hosts, kind)) in zip(printed.splitlines(), KNOWN.items(), strict=True):
            assert line.startswith(f'{target} {devices} {hosts} ') and kind in line, errors


@pytest.mark.parametrize('target', ['h100:4', 'tpu-v5e:2x2'])
def test_plans_of_four_devices(tmp_path, target):
    """One reduction of four bytes per parameter in a training step, and no message beside it but of a few numbers; the
    operations are those of any other device. On a GPU, zeros follow each array in the vector of all."""
    needs_compiler(target)
    record = planned(tmp_path, target, *TINY)
    train, sample, likelihood = (record['programs'][name] for name in ('train', 'sample', 'likelihood'))
    reduced = train['collectives']['all-reduce']
    assert record['devices'] == 4 and record['mesh'] == {'data': 4, 'fsdp': 1}
    assert sum(kind['count'] for kind in train['collectives'].values()) <= 3
    assert reduced['bytes'] == pytest.approx(4 * record['parameters'], rel=0.02)
    config = tiny({'model.multipliers': (1, 2), 'model.attention_resolutions': (4,)})
    arrays = len(jax.tree.leaves(build.build(config).abstract_state().params))
    zeros = record['state_bytes']['parameters'] / 4 - record['parameters']
    assert 0 <= zeros < 128 * arrays + 1024 if target.startswith('h100') else zeros == 0
    here = planned(tmp_path / 'here', 'here', *TINY, '--config.model.implementation=plain')['programs']
    for name, found in record['programs'].items():
        assert found['fits'] and found['images'] % 4 == 0
        assert found['flops_per_image'] == pytest.approx(here[name]['flops_per_image'], rel=0.05)
    # Upper bounds, so that they do not creep up: a launch costs microseconds on a GPU.
    most = (760, 140, 145) if target.startswith('h100') else (3000, 330, 290)
    assert all(found['kernels'] <= limit for found, limit in zip((train, sample, likelihood), most, strict=True))


def test_what_cannot_fit_is_said_not_to_fit(tmp_path):
    needs_compiler('h100')
    huge = ('--config.train.batch_size=64000000', "--config.plan.programs=('train',)")
    train = planned(tmp_path, 'h100:1', *TINY, *huge)['programs']['train']
    assert train['fits'] is False and train['peak_bytes'] > 0.75 * 85e9


@pytest.mark.slow
def test_cifar10_for_an_h100(tmp_path):
    """By hand, convolutions and matrix products of DDPM's network of 35.7M parameters take 12.44 GFLOP for an image;
    their gradients take twice as much: 37.33 for a step. The kernels stay few."""
    needs_compiler('h100')
    keys = ("--config.plan.programs=('train','sample')", '--config.model.dtype=bfloat16')
    programs = planned(tmp_path, 'h100:1', *keys, config='--config=cifar10')['programs']
    train, sample = programs['train'], programs['sample']
    assert train['flops_per_image'] == pytest.approx(37.33e9, rel=0.005)
    assert train['kernels'] <= 1000 and train['peak_bytes'] <= 2.8e9 and train['fits']
    assert sample['kernels'] <= 450 and sample['fits']


SCATTER = """
import os
from diffusion.runtime import targets
os.environ.update(targets.prepare('h100:1'))
import jax, jax.numpy as jnp
from diffusion.runtime.compilation import deterministic
(device,) = targets.devices('h100:1')
one = jax.sharding.SingleDeviceSharding(device)
x, i = (jax.ShapeDtypeStruct((500,), dtype, sharding=one) for dtype in (jnp.float32, jnp.int32))
for options in ({}, deterministic(device.platform)):
    program = jax.jit(lambda x, i: x.at[i].add(x), compiler_options=options).lower(x, i).compile()
    print('sort' in program.as_text())
"""


def test_a_deterministic_program_sorts_what_it_adds_at_equal_places():
    """Otherwise a GPU adds by atomic operations, in any order."""
    needs_compiler('h100')
    done = subprocess.run([sys.executable, '-c', SCATTER], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ['False', 'True'], done.stderr
