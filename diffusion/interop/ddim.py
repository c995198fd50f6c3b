"""Checkpoints of the DDIM authors' code, and of the DDPMs that were converted for it: PyTorch state dicts.

A run of theirs saves the list [network, optimizer, epoch, step, EMA], the converted DDPMs a network alone.
The file has no config: image size and dropout are not in it, the noise is that of all their configs.
"""

import operator

from diffusion.interop.tensors import Found, from_torch, load_torch

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


def read(path, *, image_size):
    """A checkpoint as Found; `image_size`, in pixels, says at which resolutions its attentions are.

    Raises ValueError where the file cannot be read, or holds nothing of the kind.
    """
    saved = load_torch(path)
    facts = {}
    states = [saved]
    if isinstance(saved, (list, tuple)):
        if len(saved) not in (4, 5):
            raise ValueError(f'{path} holds a list of {len(saved)}, not [network, optimizer, epoch, step, EMA]')
        facts = {'epoch': whole_number(saved[2]), 'step': whole_number(saved[3])}
        states = [saved[0], *saved[4:]]
    weights = {}
    for which, state in zip(('params', 'ema'), states, strict=False):
        where = f'{path}, where its {which} should be,'
        weights[which] = without_module(from_torch(state, where), where)
    settings = network_settings(weights['params'], path, image_size)
    levels = len(settings['model']['multipliers'])
    return Found(settings, weights, lambda path: names(path, levels), facts)


def whole_number(value):
    """An int, or a tensor of one, as int; None for anything else."""
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: of a tensor without values
        return None


def without_module(tensors, where):
    """{name: tensor} without the 'module.' that a parallel network has before each name."""
    plain = {name.removeprefix('module.'): tensor for name, tensor in tensors.items()}
    twice = [name for name in plain if name in tensors and f'module.{name}' in tensors]
    if twice:
        raise ValueError(f'{where} holds both {twice[0]} and module.{twice[0]}: delete one of them')
    return plain


def names(path, levels):
    """The one name of a parameter of ours there, where the way up counts its levels from the finest."""
    if path[0] == 'up':
        path = ('up', levels - 1 - path[1], *path[2:])
    resample = {'resample': f'{path[0]}sample.conv'}
    return ('.'.join((NAMES | resample).get(part, str(part)) for part in path),)


def network_settings(tensors, path, image_size):
    """The parts 'data', 'model' and 'schedule' of our config, from the shapes of their tensors."""
    channels, image_channels = convolution('conv_in.weight', tensors, path)
    widths = [convolution('down.0.block.0.conv1.weight', tensors, path)[0]]
    while (name := f'down.{len(widths)}.block.0.conv1.weight') in tensors:
        widths.append(convolution(name, tensors, path)[0])
    if any(width % channels for width in widths):
        raise ValueError(f'{path}: the widths {widths} are not multiples of the {channels} of conv_in.weight')
    if image_size < 1:
        raise ValueError(f'{path} does not say for images of which size it is: give config.data.image_size')
    levels = range(len(widths))
    num_blocks = sum(f'down.0.block.{i}.conv1.weight' in tensors for i in range(len(tensors)))
    return {
        'data': {'image_size': image_size, 'channels': image_channels},
        'model': {
            'kind': 'eps',
            'channels': channels,
            'multipliers': tuple(width // channels for width in widths),
            'num_blocks': num_blocks,
            'attention_resolutions': tuple(
                image_size >> level for level in levels if f'down.{level}.attn.0.q.weight' in tensors
            ),
            'groups': 32,
            'first_level': 0,
        },
        'schedule': {'name': 'linear', 'T': 1000, 'beta_start': 1e-4, 'beta_end': 0.02},
    }


def convolution(name, tensors, path):
    """(channels out, channels in) of the convolution of that name. Raises ValueError where there is none."""
    shape = tensors[name].shape if name in tensors else None
    if shape is None or len(shape) != 4 or 0 in shape:
        found = 'is missing' if shape is None else f'has the shape {shape}'
        raise ValueError(f'{path} is no network of the DDIM code: {name} {found}, but a convolution was expected')
    return shape[:2]
