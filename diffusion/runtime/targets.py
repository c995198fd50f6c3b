"""Accelerators that need not be here: XLA compiles for them on any machine, from a description.

A target is written as CARD:DEVICES, CARD:DEVICESxHOSTS for GPUs and as CARD:TOPOLOGY for TPUs, such as h100:8,
a100-80:8x2 and tpu-v5e:4x4; 'here' are the devices of this machine.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from diffusion.runtime import memory, mesh
from diffusion.util import RunError, first_line

HERE = 'here'
GPU_SHARE = 0.75  # JAX takes this share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another
TPU_SHARE = 15.75 / 16  # XLA leaves this share of a TPU's memory to programs

# Who says so. Links count in one direction; the pages state twice as much, for both together.
XLA = 'memory: XLA, https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs'
PDF = 'https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf'
A100 = f'{XLA}; rate, link: NVIDIA A100 Tensor Core GPU, data sheet, {PDF}'
H100 = f'{XLA}; rate, link: NVIDIA H100, specifications, https://www.nvidia.com/en-us/data-center/h100/'
H200 = f'{XLA}; rate, link: NVIDIA H200, specifications, https://www.nvidia.com/en-us/data-center/h200/'
B200 = f'{XLA}; rate, link: NVIDIA DGX B200, specifications, https://www.nvidia.com/en-us/data-center/dgx-b200/'
GOOGLE = 'Google Cloud, system architecture of the TPU, https://docs.cloud.google.com/tpu/docs/'
TPU_V4 = f'{GOOGLE}v4; link: 6 of 50 GB/s, https://arxiv.org/abs/2304.01433'
# A link of v2 sends 496 Gbit/s, one of v3 656; a chip has four, and a device is half a chip.
TPU_V2 = 'Jouppi et al., A domain-specific supercomputer for training deep neural networks, 2020, doi:10.1145/3360307'
TPU_V3 = f'{GOOGLE}v3; link: {TPU_V2}'


@dataclasses.dataclass(frozen=True)
class Card:
    """What the manufacturer says of a device; None is not known.

    Args:
        kind: as `jax.Device.device_kind` names it.
        memory: bytes.
        bandwidth: bytes per second of its memory.
        link: bytes per second that it sends to the others of its host or slice.
        source: who says so, with the page.
        details: of a GPU, what XLA's compiler asks; of a TPU, the name of its generation and its configuration.
    """

    kind: str
    memory: float | None
    bandwidth: float | None
    link: float | None
    source: str
    details: dict[str, Any]

    @property
    def is_gpu(self) -> bool:
        return self.kind.startswith('NVIDIA')

    @property
    def usable(self) -> float | None:
        """The bytes of memory that a program may take."""
        return self.memory and self.memory * _share(self.kind)

    @property
    def flops(self) -> float | None:
        """Operations per second in bfloat16 matrix products, if they are known."""
        return mesh.peak_flops(self.kind)


AMPERE = dict(major=8, cores=108, fpus=64, shared=166912, shared_per_core=167936, l2=41943040, clock=1.41)
HOPPER = dict(major=9, cores=132, fpus=128, shared=232448, shared_per_core=233472, l2=52428800, clock=1.98)
BLACKWELL = dict(major=10, cores=148, fpus=128, shared=232448, shared_per_core=233472, l2=132644864, clock=1.965)

CARDS = {
    'a100-40': Card('NVIDIA A100-SXM4-40GB', 42331013120, 1.5552e12, 300e9, A100, AMPERE),
    'a100-80': Card('NVIDIA A100-SXM4-80GB', 85100068864, 2.03904e12, 300e9, A100, AMPERE),
    'h100': Card('NVIDIA H100 80GB HBM3', 84942979072, 3.35232e12, 450e9, H100, HOPPER),
    'h200': Card('NVIDIA H200', 151397597184, 4.8e12, 450e9, H200, HOPPER),
    'b200': Card('NVIDIA B200', 191514411008, 7.67232e12, 900e9, B200, BLACKWELL),
    'tpu-v2': Card('TPU v2', 8 * 2**30, 350e9, 124e9, TPU_V2, {'name': 'v2'}),
    'tpu-v3': Card('TPU v3', 16 * 2**30, 450e9, 164e9, TPU_V3, {'name': 'v3'}),
    'tpu-v4': Card('TPU v4', 32 * 2**30, 1.2e12, 300e9, TPU_V4, {'name': 'v4', 'chip_config_name': 'megacore'}),
    'tpu-v5e': Card('TPU v5 lite', 16 * 2**30, 819e9, 200e9, f'{GOOGLE}v5e', {'name': 'v5e'}),
    'tpu-v5p': Card('TPU v5', 95 * 2**30, 2.765e12, 600e9, f'{GOOGLE}v5p', {'name': 'v5p'}),
    'tpu-v6e': Card('TPU v6 lite', 32 * 2**30, 1.638e12, 400e9, f'{GOOGLE}v6e', {'name': 'v6e'}),
    'tpu-7x': Card('TPU7x', 96 * 2**30, 3.69e12, 300e9, f'{GOOGLE}tpu7x', {'name': 'TPU7x'}),  # half a chip
}

THREE_AXES = ('tpu-v4', 'tpu-v5p', 'tpu-7x')  # TPUs whose chips lie in a torus of three axes; others have two
SHAPES = {True: r'\d+(x\d+)?', False: r'\d+x\d+(x\d+)?'}  # what follows the colon; True: for a GPU

# A description for XLA's compiler of GPUs, in the text form of its GpuTargetConfigProto.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: {major} {extension} }} device_vendor: "NVIDIA Corporation" name: "{kind}"
  platform_version: "Compute Capability {major}.0" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{kind}"
"""


def parse(target: str) -> tuple[Card, str]:
    """Return the card and the shape that a target names.

    Raises:
        RunError: there is no such card, or it has no such shape; the message lists the cards.
    """
    name, _, shape = target.partition(':')
    if name not in CARDS:
        raise RunError(
            f'config.plan.target is {target!r}, but must be {HERE!r} or begin with one of {", ".join(CARDS)}, such as '
            'h100:8, a100-80:8x2 (on two hosts) or tpu-v5e:4x4'
        )
    card = CARDS[name]
    if not re.fullmatch(SHAPES[card.is_gpu], shape):
        wanted = 'the number of GPUs on a host, perhaps with that of hosts' if card.is_gpu else 'the slice of the TPU'
        example = f'{name}:8 or {name}:8x2' if card.is_gpu else f'{name}:{"2x2x1" if name in THREE_AXES else "2x4"}'
        raise RunError(f'config.plan.target is {target!r}, but after {name} comes {wanted}: {example}')
    return card, shape


def prepare(target: str) -> dict[str, str]:
    """Leave the devices of this machine alone, and return what a target's compilers need in the process's environment.

    Call it, and set the variables, before anything uses a device. With them, nobody asks a TPU's host for its slice,
    several processes may plan for TPUs at once, and XLA does not try out kernels, for which it would need the GPU.

    Raises:
        RunError: there is no such target.
    """
    if target == HERE:
        return {}
    parse(target)
    jax.config.update('jax_platforms', 'cpu')
    return {
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-8',  # any that libtpu knows
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_autotune_level=0'.strip(),
    }


def devices(target: str) -> list[Any]:
    """Return the devices of a target, which can be compiled for.

    Raises:
        RunError: the compiler is missing, or the card has no such topology.
    """
    if target == HERE:
        return list(jax.devices())
    card, shape = parse(target)
    _require_compiler(card)
    try:
        return list((_gpus if card.is_gpu else _tpus)(card, shape).devices)
    except Exception as error:  # plugins raise many types
        raise RunError(f'config.plan.target={target}: the compiler refuses it: {first_line(error)}') from error


def describe_here() -> Card:
    """Return what is known of the first device of this machine."""
    device = jax.devices()[0]
    known = [card for card in CARDS.values() if device.device_kind == card.kind]
    usable = memory.of_device(device)
    about = known[0] if known else Card(device.device_kind, None, None, None, '', {})
    return dataclasses.replace(about, memory=usable and usable / _share(device.device_kind))


def _share(kind: str) -> float:
    return GPU_SHARE if kind.startswith('NVIDIA') else TPU_SHARE if kind.startswith('TPU') else 1.0


def _gpus(card: Card, shape: str) -> Any:
    on_host, _, hosts = shape.partition('x')
    extension = '' if card.details['major'] < 9 else 'feature_extension: ACCELERATED_FEATURES'
    values = card.details | {'bandwidth': card.bandwidth, 'memory': card.memory, 'kind': card.kind}
    return topologies.get_topology_desc(
        card.kind,
        platform='cuda',
        target_config=DESCRIPTION.format(**values, extension=extension),
        topology=f'1x{hosts or 1}x{on_host}',
    )


def _tpus(card: Card, shape: str) -> Any:
    options = {key: value for key, value in card.details.items() if key != 'name'}
    return topologies.get_topology_desc(f'{card.details["name"]}:{shape}', platform='tpu', **options)


def _require_compiler(card: Card) -> None:
    modules = ['jax_cuda13_plugin', 'jax_cuda12_plugin'] if card.is_gpu else ['libtpu']
    if not any(map(importlib.util.find_spec, modules)):
        raise RunError(
            f"config.plan.target: the compiler for {card.kind} is not installed: pip install '.[plan]', in an "
            'environment of its own if this one has an accelerator'
        )
