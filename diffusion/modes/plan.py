"""--mode=plan: what fits on accelerators that need not be here, and what it costs, from programs compiled for them."""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import autoconfig, build, conditions, data, workdir
from diffusion.build import Experiment
from diffusion.data.prefetch import BATCHES_AHEAD
from diffusion.modes import likelihood, sample, train
from diffusion.networks import Program
from diffusion.runtime import hlo, memory, mesh, targets
from diffusion.runtime.compilation import compiling
from diffusion.runtime.interrupt import leaves
from diffusion.runtime.targets import Card
from diffusion.util import (
    RunError,
    first_line,
    json_sha256,
    naming,
    read_json,
    say,
    versions,
    write_json,
    write_text,
)

LARGEST_BATCH = 2**16  # images; larger ones are not tried unless asked for
STEP_OF_BATCH = 1 / 8  # how exactly the largest batch is found


def run(config: ConfigDict, path: str) -> int:
    """Write plan/<name>.json and .md: memory, operations, messages, kernels and a bound on the time, by program.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        The exit status, 0, also if something does not fit.

    Raises:
        RunError: the config does not allow it, the target is unknown, or its compiler is missing.
    """
    # Resolve.
    devices = targets.devices(config.plan.target)
    config = workdir.resolve(config, path, platform=devices[0].platform)
    asked = config.plan
    card = targets.describe_here() if asked.target == targets.HERE else targets.parse(asked.target)[0]
    exp = build.build(config, devices)
    num_hosts = len({device.process_index for device in devices})
    train.require_equal_parts(config, exp)
    train.require_shards(config)
    folder = workdir.output_folder(config, path, 'plan', 'plan')

    settings = {
        'target': asked.target,
        'devices': len(devices),
        'hosts': num_hosts,
        'device': describe_card(card),
        'mesh': dict(exp.mesh.shape),
        **settings_of_programs(config),
        'versions': versions(),
    }
    # The name contains a digest of all settings: plans of others do not replace each other.
    digest = json_sha256(settings)[:8]
    about = f'{asked.target}-fsdp{config.mesh.fsdp}-batch{config.train.batch_size}-{config.model.dtype}'
    name = re.sub(r'\W+', '-', f'{about}-{digest}')

    # Compute. Compiling may take an hour, so each program is kept as soon as it is measured.
    compilers = {'train': compile_train, 'sample': compile_sample, 'likelihood': compile_likelihood}
    unfinished = os.path.join(folder, f'{name}.unfinished')
    programs: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        programs = read_json(unfinished)
    for what in asked.programs:
        if what not in programs:
            programs[what] = measure(compilers[what], config, exp, card, what)
            with workdir.writing(folder, key='plan.folder'):
                write_json(unfinished, programs)
        leaves(f'{", ".join(programs)} of the plan are kept; the same command goes on')
    others = alternatives(config, exp, card) if asked.alternatives else []
    largest = largest_batch(config, exp, card) if asked.largest_batch else None

    # Record.
    record = settings | {
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(exp.abstract_state().params)),
        'state_bytes': state_bytes(exp),
        'programs': programs,
        'alternatives': others,
        'largest_batch': largest,
        'host': on_each_host(config, num_hosts),
    }
    text = markdown(record)
    with workdir.writing(folder, key='plan.folder'):
        write_json(os.path.join(folder, f'{name}.json'), record)
        write_text(os.path.join(folder, f'{name}.md'), text)
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)

    # Report.
    say(f'\n{text}')
    workdir.wrote(folder, f'{name}.json', f'{name}.md')
    return 0


def settings_of_programs(config: ConfigDict) -> dict[str, Any]:
    """Return what the record says of the config: all that programs depend on."""
    keys = ('image_size', 'channels', 'labels', 'flip', 'shards', 'cache')
    parts = {part: workdir.settings_for_record(config[part]) for part in ('plan', 'train', 'sample', 'likelihood')}
    parts['sample']['guide'] = bool(config.sample.guide)  # its place is left out
    return parts | {
        'data': {key: config.data[key] for key in keys},
        'model': config.model.to_dict(),
        'schedule': config.schedule.to_dict(),
    }


def compile_train(config: ConfigDict, exp: Experiment) -> tuple[Program, int]:
    """Return the training step, for batches that hosts send, and the images of a batch."""
    batch, size = config.train.batch_size, config.data.image_size
    images = _array((batch, size, size, config.data.channels), np.uint8, mesh.split_batch(exp.mesh))
    state, labels = exp.abstract_state(packed=True), _labels(config, exp, batch)
    return train.compile_step(config, exp, state, images, None, *labels), batch


def compile_sample(config: ConfigDict, exp: Experiment) -> tuple[Program, int]:
    """Return the sampler, and the images of a batch."""
    asked, size = config.sample, config.data.image_size
    _, chain = sample.resolve_chain(asked, exp)
    batch = min(asked.batch_size, asked.num_images)
    batch += -batch % exp.mesh.size
    params, shape = exp.abstract_state().params, (size, size, config.data.channels)
    guide = build.build(conditions.config_of_guide(config), list(exp.mesh.devices.flat)) if asked.guide else None
    if guide:
        params = params, guide.abstract_state().params
    guided = dict(scale=asked.guidance, interval=tuple(asked.guidance_interval), guide=guide)
    net_of = conditions.condition(exp, conditions.all_classes(config), **guided)
    draw = sample.follow_chain(exp, shape, kind=config.model.kind, rule=asked.rule, **chain)
    with naming('config.sample'):
        return sample.compile_draw(exp, params, draw, batch_size=batch, net_of=net_of), batch


def compile_likelihood(config: ConfigDict, exp: Experiment) -> tuple[Program, int]:
    """Return the first quantity of likelihood.quantities, in float32, and the images of a batch."""
    config = config.copy_and_resolve_references()
    config.model.dtype, config.model.remat = 'float32', False
    exp = build.build(config, list(exp.mesh.devices.flat))
    asked, size, split = config.likelihood, config.data.image_size, mesh.split_batch(exp.mesh)
    batch = asked.batch_size + -asked.batch_size % exp.mesh.size
    function = likelihood.quantities(config, exp)[asked.quantities[0]]
    x0 = _array((batch, size, size, config.data.channels), np.float32, split)
    key = _array((), jax.random.key(0).dtype, mesh.replicated(exp.mesh))
    numbers, labels = _array((batch,), np.int32, split), _labels(config, exp, batch)
    arguments = key, exp.abstract_state().params, x0, numbers, *labels
    with naming('config.likelihood'), jax.default_matmul_precision('highest'):
        return likelihood.compile_quantity(exp, function, *arguments), batch


def _labels(config, exp, batch):
    """The labels of a batch, if the network is conditional."""
    return [_array((batch,), np.int32, mesh.split_batch(exp.mesh))] if config.data.labels else []


def _array(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def measure(
    compile_program: Callable[[ConfigDict, Experiment], tuple[Program, int]],
    config: ConfigDict,
    exp: Experiment,
    card: Card,
    what: str,
) -> dict[str, Any]:
    """Compile a program, and return what it takes.

    Returns:
        'of': what the program does, in words; 'images': of a batch; 'peak_bytes', 'fits' and 'memory', its parts: on
        each device; 'flops_per_image' and 'flops_per_device'; 'kernels': of a training step, or within the loop over
        the chain or of the solver; 'collectives': messages between devices, and 'collective_bytes', of their results;
        'bytes_accessed': of the device's memory, as XLA counts them, None if there is a loop, which XLA counts as if
        it ran once; 'bound': see `bound`; 'compile_seconds'. What is in a loop counts once among kernels and messages,
        and so do the parts of train.accumulate. If the compiler refuses because memory is too small, 'why' is its
        message, 'fits' is False, and everything but 'of' is None.
    """
    of, whole = extent(config, exp, what)
    began = time.perf_counter()
    try:
        with compiling(f'{what} for {config.plan.target}'):
            program, images = compile_program(config, exp)
    except (RunError, jax.errors.JaxRuntimeError) as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) and not memory.exhausted(error):
            raise
        return dict.fromkeys(UNKNOWN) | {'of': of, 'fits': False, 'why': first_line(error)}
    seconds = time.perf_counter() - began
    operations = hlo.operations(program.compiled.as_text() or '')
    looped = [op for op in operations if op.in_loop]
    messages = hlo.collectives(operations)
    plan: Any = program.compiled.memory_analysis()
    peak = (memory.of_program(program.compiled) or 0) + plan.generated_code_size_in_bytes
    found = {
        'of': of,
        'images': images,
        'peak_bytes': peak,
        'fits': None if card.usable is None else peak <= card.usable,
        'memory': {
            'arguments': plan.argument_size_in_bytes,
            'results': plan.output_size_in_bytes - plan.alias_size_in_bytes,
            'temporary': plan.temp_size_in_bytes,
            'code': plan.generated_code_size_in_bytes,
        },
        'flops_per_image': program.flops / images,
        'flops_per_device': program.flops / exp.mesh.size,
        'kernels': len(looped if what != 'train' and looped else operations),
        'collectives': messages,
        'collective_bytes': sum(kind['bytes'] for kind in messages.values()),
        'bytes_accessed': None if looped else (program.compiled.cost_analysis() or {}).get('bytes accessed'),
        'compile_seconds': round(seconds, 1),
    }
    group = min((size for size in exp.mesh.shape.values() if size > 1), default=1)
    counted = found if whole else found | {'flops_per_device': None}
    return found | {'bound': bound(counted, card, group)}


UNKNOWN = (
    *('images', 'peak_bytes', 'memory', 'flops_per_image', 'flops_per_device', 'kernels', 'collectives'),
    *('collective_bytes', 'bytes_accessed', 'compile_seconds', 'bound'),
)


def extent(config: ConfigDict, exp: Experiment, what: str) -> tuple[str, bool]:
    """Return what a program does, in words, and whether its operations are those of all of that."""
    if what == 'train':
        parts = config.train.accumulate
        return 'one step' if parts == 1 else f'one step in {parts} parts', True
    if what == 'sample':
        done, _ = sample.resolve_chain(config.sample, exp)
        return f'a chain of {done["num_steps"]} steps', True
    quantity = config.likelihood.quantities[0]
    if quantity == 'flow':
        return 'flow, one step of its solver', False
    return quantity, True


def bound(found: dict[str, Any], card: Card, group: int) -> dict[str, float | None]:
    """Return a bound from below on the seconds of a program, and what follows from it. It predicts nothing.

    Arithmetic is done at the manufacturer's rate in bfloat16. Of n bytes that g devices gather, (g−1)/g·n leave each
    device or reach it, and twice as many if they are reduced for all. Traffic of the memory, as XLA counts it, is no
    bound, because caches save some of it; it is shown beside the others.

    Args:
        found: what `measure` found.
        card: the device.
        group: g, the number of devices that exchange messages at least.

    Returns:
        Seconds of 'arithmetic', 'memory' and 'links' by themselves; 'seconds', the longer of arithmetic and links;
        'sum', of all three; 'images_per_second' and 'utilisation', at most. None where a rate or the work is not known.
    """

    def seconds(work: float | None, rate: float | None) -> float | None:
        return None if work is None or rate is None else work / rate

    reduced = found['collectives'].get('all-reduce', {'bytes': 0})['bytes']
    sent = (group - 1) / group * (found['collective_bytes'] + reduced)
    arithmetic = seconds(found['flops_per_device'], card.flops)
    traffic = seconds(found['bytes_accessed'], card.bandwidth)
    links = seconds(sent, card.link) if sent else 0.0
    parts = {'arithmetic': arithmetic, 'memory': traffic, 'links': links}
    if arithmetic is None or links is None:
        return parts | dict.fromkeys(('seconds', 'sum', 'images_per_second', 'utilisation'))
    least = max(arithmetic, links)
    return parts | {
        'seconds': least,
        'sum': None if traffic is None else arithmetic + traffic + links,
        'images_per_second': found['images'] / least,
        'utilisation': arithmetic / least,
    }


def alternatives(config: ConfigDict, exp: Experiment, card: Card) -> list[dict[str, Any]]:
    """Return what one other setting would change in the training step: [{'change', …, as in `measure`}]."""
    devices = list(exp.mesh.devices.flat)
    other = 'float32' if config.model.dtype == 'bfloat16' else 'bfloat16'
    on_host = len(devices) // len({device.process_index for device in devices})
    changes = {
        'model.remat': not config.model.remat,
        'train.accumulate': 2 * config.train.accumulate,
        'model.dtype': other,
        'mesh.fsdp': on_host,
    }
    found = []
    for key, value in changes.items():
        changed = config.copy_and_resolve_references()
        if changed[key.split('.')[0]][key.split('.')[1]] == value:
            continue
        changed.update_from_flattened_dict({key: value})
        other_exp = build.build(changed, devices)
        try:
            train.require_equal_parts(changed, other_exp)
        except RunError as error:
            say(f'{key}={value} is left out: {error}')
            continue
        found.append({'change': f'{key}={value}'} | measure(compile_train, changed, other_exp, card, 'train'))
    return found


def largest_batch(config: ConfigDict, exp: Experiment, card: Card) -> dict[str, Any]:
    """Find the largest train.batch_size that fits, by bisection to an eighth.

    Returns:
        'images': the batch; 0 if not even the smallest fits, None if the memory of the device is not known. 'complete':
        whether a larger one was tried, and does not fit.
    """
    if card.usable is None:
        return {'images': None, 'complete': False}
    unit = math.lcm(exp.mesh.size * config.train.accumulate, config.data.shards or 1)

    def fits(units: int) -> bool:
        changed = config.copy_and_resolve_references()
        changed.train.batch_size = units * unit
        answer = bool(measure(compile_train, changed, exp, card, 'train')['fits'])
        say(f'a batch of {units * unit} images {"fits" if answer else "does not fit"}')
        return answer

    low, high = 0, config.train.batch_size // unit
    most = max(LARGEST_BATCH // unit, high)
    while fits(high):
        if high == most:
            return {'images': high * unit, 'complete': False}
        low, high = high, min(2 * high, most)
    while high - low > max(1, STEP_OF_BATCH * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {'images': low * unit, 'complete': True}


def state_bytes(exp: Experiment) -> dict[str, int]:
    """Return the bytes of the parts of a TrainState on each device."""
    state = exp.abstract_state(packed=True)
    parts = {'parameters': state.params, 'EMA': state.ema, 'optimizer': state.opt_state}
    return {name: train.held_by_device(part) for name, part in parts.items()}


def on_each_host(config: ConfigDict, num_hosts: int) -> dict[str, int]:
    """Return what the images take on each of `num_hosts` hosts: disk for decoded ones, memory for batches that wait.

    If data.shards is open, it is the number that would be chosen for a million images.
    """
    nbytes = config.data.image_size**2 * config.data.channels
    shards = config.data.shards or autoconfig.choose_shards(config, 10**6)
    most = max(len(data.own_shards(shards, host, num_hosts)) for host in range(num_hosts))
    return {
        'disk_bytes_of_a_million_images': 10**6 * nbytes * most // shards if config.data.cache else 0,
        'memory_bytes_of_batches': BATCHES_AHEAD * config.train.batch_size // num_hosts * nbytes,
    }


def describe_card(card: Card) -> dict[str, Any]:
    """Return what the record says of a device."""
    return {
        'kind': card.kind,
        'memory_bytes': card.memory,
        'usable_bytes': card.usable,
        'flops_per_second': card.flops,
        'memory_bytes_per_second': card.bandwidth,
        'link_bytes_per_second': card.link,
        'source': card.source,
    }


def markdown(record: dict[str, Any]) -> str:
    """Return the plan as tables."""
    usable = record['device']['usable_bytes']
    there = f'{memory.size(usable)} of memory can be used on each' if usable else 'its memory is not known'
    hosts = f' on {record["hosts"]} hosts' if record['hosts'] > 1 else ''
    state = ', '.join(f'{name} {memory.size(nbytes)}' for name, nbytes in record['state_bytes'].items())
    lines = [
        f'{record["devices"]} × {record["device"]["kind"]}{hosts} ({record["target"]}): {there}. '
        f'Of the state, each holds: {state}.',
        '',
        '| program | images | peak memory | fits | GFLOP/image | kernels | messages | their bytes | at least, ms '
        '| at most, images/s | compile, s |',
        '|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    rows = [(f'{name}: {found["of"]}', found) for name, found in record['programs'].items()]
    rows += [(f'train, {other["change"]}', other) for other in record['alternatives']]
    for name, found in rows:
        if found['images'] is None:
            lines.append(f'| {name} |  | {found["why"]} | no |  |  |  |  |  |  |  |')
            continue
        limit = found['bound']
        least, rate = ('?' if limit[key] is None else f'{factor * limit[key]:,.3g}' for key, factor in SHOWN.items())
        count = sum(kind['count'] for kind in found['collectives'].values())
        fits = {True: 'yes', False: 'no', None: '?'}[found['fits']]
        lines.append(
            f'| {name} | {found["images"]} | {memory.size(found["peak_bytes"])} | {fits} '
            f'| {found["flops_per_image"] / 1e9:,.4g} | {found["kernels"]} | {count} '
            f'| {memory.size(found["collective_bytes"])} | {least} | {rate} | {found["compile_seconds"]:.0f} |'
        )
    if record['largest_batch'] is not None:
        lines += ['', describe_largest(**record['largest_batch'])]
    disk, waiting = (memory.size(nbytes) for nbytes in record['host'].values())
    lines += ['', f'Each host keeps {disk} of every million decoded images, and up to {waiting} of batches in memory.']
    lines += ['', NOTE]
    return '\n'.join(lines) + '\n'


def describe_largest(images: int | None, complete: bool) -> str:
    """Return one line about what `largest_batch` found."""
    if images is None:
        return 'How large a train.batch_size fits is not known, because the memory of the device is not.'
    if not complete:
        return f'train.batch_size={images} fits; larger ones were not tried.'
    return f'The largest train.batch_size that fits, to an eighth: {images}.'


SHOWN = {'seconds': 1e3, 'images_per_second': 1}
NOTE = (
    'A row is of what its first column names. But kernels and messages in a loop count once: the kernels of `sample` '
    'and `likelihood` are those of one step of the chain, of `flow` those of one step of the solver, and those of a '
    'step in parts are those of one part and of the update. How many steps that solver takes is not known. '
    '"At least" is the time that arithmetic or messages of the whole row, such as a chain, take at the '
    "manufacturer's rates, whichever is longer: a bound, not a prediction. "
    '"Fits" leaves out the images that training keeps on the devices (data.placement). Unless data.shards is given, '
    'each host keeps all decoded images if they take up to 8 GB.'
)
