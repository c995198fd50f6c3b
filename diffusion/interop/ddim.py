"""Reads checkpoints of the DDIM authors' code, and DDPMs that were converted for it: PyTorch state dicts.

Their training saves the list [network, optimizer, epoch, step, EMA]; a converted DDPM is a network alone. The files
hold no config: neither the image size nor the noise schedule is in them. (All configs of the authors have the linear
schedule with T = 1000, which is our default.)
"""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.interop.tensors import Found, Path
from diffusion.interop.weights import load_torch, require_image_size, state_dict

# Parts of our parameters' paths → parts of their names.
NAMES = {
    'time1': 'temb.dense.0',
    'time2': 'temb.dense.1',
    'time': 'temb_proj',
    'mid1': 'mid.block_1',
    'mid2': 'mid.block_2',
    'mid_attention': 'mid.attn_1',
    'blocks': 'block',
    'attentions': 'attn',
    'shortcut': 'nin_shortcut',
    'query': 'q',
    'key': 'k',
    'value': 'v',
    'out': 'proj_out',
    'kernel': 'weight',
    'scale': 'weight',
}
FIXED = {  # settings that their code does not vary, named as in our config
    'network': 'unet',
    'variance': 'fixed',
    'kind': 'eps',
    'groups': 32,
    'first_level': 0,
    'level_scale': 1.0,
    'head_channels': 0,
    'norm_epsilon': 1e-6,
    'downsample_padding': 0,
    'mid_attention': True,
    'embedding_order': 'sin_cos',
    'embedding_shift': 1,
}


def read(place: str, *, image_size: int) -> Found:
    """Read a checkpoint.

    Args:
        place: the file.
        image_size: in pixels. The file shows which levels have attention; the image size turns them into resolutions.

    Returns:
        What the file holds; its weights include 'ema' if the file does.

    Raises:
        ValueError: the file cannot be read, or holds another kind of network.
    """
    saved = load_torch(place)
    facts = {}
    states = [saved]
    if isinstance(saved, (list, tuple)):
        if len(saved) not in (4, 5):
            raise ValueError(
                f'{place} holds a list of {len(saved)}, but [network, optimizer, epoch, step, EMA] was expected'
            )
        facts = {'epoch': _integer(saved[2]), 'step': _integer(saved[3])}
        states = [saved[0], *saved[4:]]
    weights = {}
    for which, state in zip(('params', 'ema'), states, strict=False):
        where = f'{place} ({which})'
        weights[which] = _without_module(state_dict(state, where), where)
    settings = network_settings(weights['params'], place, image_size)
    levels = len(settings['model']['multipliers'])
    return Found(settings, weights, lambda path: names(path, levels), facts)


def _integer(value: Any) -> int | None:
    """Convert an integer, or a tensor that holds one, to int; None for anything else."""
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        return None


def _without_module(tensors: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Drop the 'module.' with which torch.nn.DataParallel prefixes each name."""
    plain = {name.removeprefix('module.'): tensor for name, tensor in tensors.items()}
    twice = [name for name in plain if name in tensors and f'module.{name}' in tensors]
    if twice:
        raise ValueError(f'{where} holds both {twice[0]} and module.{twice[0]}: delete one of them')
    return plain


def names(path: Path, levels: int) -> tuple[str, ...]:
    """Return the only name of a parameter in their files, where 'up' counts its levels from the finest.

    Args:
        path: of the parameter in our tree.
        levels: the number of resolutions.
    """
    if path[0] == 'up':
        path = ('up', levels - 1 - path[1], *path[2:])
    resample = {'resample': f'{path[0]}sample.conv'}
    return ('.'.join((NAMES | resample).get(part, str(part)) for part in path),)


def network_settings(tensors: Mapping[str, np.ndarray], path: str, image_size: int) -> dict[str, dict[str, Any]]:
    """Return the parts 'data' and 'model' of our config, from the shapes of their tensors.

    Args:
        tensors: {name: tensor}.
        path: the file, for errors.
        image_size: in pixels.

    Raises:
        ValueError: the tensors are not those of their network, or the image size is missing.
    """
    channels, image_channels = _channels('conv_in.weight', tensors, path)
    widths = [_channels('down.0.block.0.conv1.weight', tensors, path)[0]]
    while (name := f'down.{len(widths)}.block.0.conv1.weight') in tensors:
        widths.append(_channels(name, tensors, path)[0])
    if any(width % channels for width in widths):
        raise ValueError(f'{path}: the widths {widths} are not multiples of the {channels} channels of conv_in.weight')
    require_image_size(path, image_size)
    num_blocks = sum(f'down.0.block.{i}.conv1.weight' in tensors for i in range(len(tensors)))
    attends = [f'down.{level}.attn.0.q.weight' in tensors for level in range(len(widths))]
    return {
        'data': {'image_size': image_size, 'channels': image_channels},
        'model': {
            **FIXED,
            'channels': channels,
            'multipliers': tuple(width // channels for width in widths),
            'num_blocks': num_blocks,
            'attention_resolutions': tuple(image_size >> level for level, a in enumerate(attends) if a),
        },
    }


def _channels(name: str, tensors: Mapping[str, np.ndarray], path: str) -> tuple[int, int]:
    """Return the output and input channels of a convolution. Raises ValueError if it is not one."""
    shape = tensors[name].shape if name in tensors else None
    if shape is None or len(shape) != 4 or 0 in shape:
        found = 'is missing' if shape is None else f'has shape {shape}'
        raise ValueError(f'{path} is not a network of the DDIM code: {name} {found}, but a convolution was expected')
    return shape[0], shape[1]
