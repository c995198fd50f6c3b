"""Reads checkpoints of OpenAI's improved-diffusion and guided-diffusion: state dicts of PyTorch, without PyTorch.

The shapes of the tensors tell widths, blocks, attention, classes, scale and shift, and learned variances. They tell
neither the image size, the attention heads, the order of their channels nor the noise schedule. For the published
files, recognized by name, those are in a table; for others they come from the config.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.interop.pytorch_file import read_state_dict
from diffusion.interop.tensors import Found, Path, with_no_class
from diffusion.interop.weights import read_safetensors, require_file, require_image_size

# Parts of our parameters' paths → parts of their names, within a block and outside of blocks.
IN_BLOCK = {
    'norm1': 'in_layers.0',
    'conv1': 'in_layers.2',
    'time': 'emb_layers.1',
    'norm2': 'out_layers.0',
    'conv2': 'out_layers.3',
    'shortcut': 'skip_connection',
    'out': 'proj_out',
}
OUTSIDE = {
    'time1': 'time_embed.0',
    'time2': 'time_embed.2',
    'label': 'label_emb',
    'conv_in': 'input_blocks.0.0',
    'mid1': 'middle_block.0',
    'mid_attention': 'middle_block.1',
    'mid2': 'middle_block.2',
    'norm_out': 'out.0',
    'conv_out': 'out.2',
}
QKV = ('query', 'key', 'value')

FIXED = {  # settings that their code does not vary, named as in our config
    'network': 'adm',
    'groups': 32,
    'first_level': 0,
    'norm_epsilon': 1e-5,
    'downsample_padding': 1,
    'mid_attention': True,
    'updown_levels': 'all',
    'embedding_order': 'cos_sin',
    'embedding_shift': 0,
}


def _published(image_size, num_heads=0, head_channels=0, order='legacy', name='linear', T=1000, scale=1.0, dropout=0.0):
    model = {'num_heads': num_heads, 'head_channels': head_channels, 'level_scale': scale, 'dropout': dropout}
    schedule = {'name': name, 'T': T, 'beta_start': 1e-4, 'beta_end': 0.02, 'offset': 0.008, 'max_beta': 0.999}
    return image_size, model | {'kind': 'eps'}, schedule, order


# From the flags in the READMEs of github.com/openai/guided-diffusion and github.com/openai/improved-diffusion. By
# default, the scripts of improved-diffusion rescale timesteps to 0 … 1000.
PUBLISHED = {
    '64x64_diffusion.pt': _published(64, head_channels=64, order='new', name='cosine', dropout=0.1),
    '128x128_diffusion.pt': _published(128, num_heads=4),
    '256x256_diffusion.pt': _published(256, head_channels=64),
    '256x256_diffusion_uncond.pt': _published(256, head_channels=64),
    '512x512_diffusion.pt': _published(512, head_channels=64),
    'lsun_bedroom.pt': _published(256, head_channels=64, dropout=0.1),
    'lsun_cat.pt': _published(256, head_channels=64, dropout=0.1),
    'lsun_horse.pt': _published(256, head_channels=64, dropout=0.1),
    'lsun_horse_nodropout.pt': _published(256, head_channels=64),
    'imagenet64_uncond_100M_1500K.pt': _published(64, num_heads=4, name='cosine', T=4000, scale=0.25),
    'imagenet64_uncond_vlb_100M_1500K.pt': _published(64, num_heads=4, name='cosine', T=4000, scale=0.25),
    'imagenet64_cond_270M_250K.pt': _published(64, num_heads=4, name='cosine', T=4000),
    'cifar10_uncond_50M_500K.pt': _published(32, num_heads=4, name='cosine', T=4000, scale=0.25, dropout=0.3),
    'cifar10_uncond_vlb_50M_500K.pt': _published(32, num_heads=4, name='cosine', T=4000, scale=0.25, dropout=0.3),
    'lsun_uncond_100M_1200K_bs128.pt': _published(256, num_heads=1),
    'lsun_uncond_100M_2400K_bs64.pt': _published(256, num_heads=1),
}


def read(
    place: str, *, image_size: int, num_heads: int = 0, head_channels: int = 0, attention_order: str = ''
) -> Found:
    """Read a checkpoint.

    Args:
        place: the file, as PyTorch or safetensors saved it.
        image_size: in pixels. The file shows which levels have attention; the image size turns them into resolutions.
        num_heads: attention heads, if `head_channels` is 0.
        head_channels: channels of each attention head.
        attention_order: 'legacy' or 'new', see `split`; '' if all attention has one head.

    Returns:
        What the file holds. A published file has a 'schedule' as well, and its own values of the other arguments.

    Raises:
        ValueError: the file cannot be read or holds another kind of network, or an argument is missing.
    """
    require_file(place)
    tensors = read_safetensors(place) if place.endswith('.safetensors') else read_state_dict(place)
    facts, model, schedule = {}, {}, {}
    name = os.path.basename(place)
    if name in PUBLISHED:
        image_size, model, schedule, order = PUBLISHED[name]
        if attention_order not in ('', order):
            raise ValueError(f'config.interop.attention_order is {attention_order!r}, but {name} has {order!r}')
        num_heads, head_channels, attention_order = model['num_heads'], model['head_channels'], order
        facts = {'published_as': name}
    settings = network_settings(tensors, place, image_size)
    settings['model'] |= model
    if schedule:
        settings['schedule'] = schedule
    levels = len(settings['model']['multipliers'])
    attends = [
        settings['data']['image_size'] >> level in settings['model']['attention_resolutions'] for level in range(levels)
    ]
    weights = split(tensors, place, num_heads=num_heads, head_channels=head_channels, order=attention_order)
    if 'label_emb.weight' in weights:
        weights['label_emb.weight'] = with_no_class(weights['label_emb.weight'])
    num_blocks = settings['model']['num_blocks']
    return Found(settings, {'params': weights}, lambda path: names(path, num_blocks, attends), facts)


def names(path: Path, num_blocks: int, attends: list[bool]) -> tuple[str, ...]:
    """Return the only name of a parameter in their files, where queries, keys and values are split.

    Their blocks are numbered across resolutions. What changes the size has a number of its own in the encoder, and
    follows the last block of its resolution in the decoder.

    Args:
        path: of the parameter in our tree.
        num_blocks: blocks of each resolution of the encoder.
        attends: whether each resolution has attention, the finest first.
    """
    *_, layer, leaf = path
    if path[0] not in ('down', 'up'):
        place, inside = OUTSIDE[path[0]], path[1:]
    else:
        direction, level, part, *rest = path
        first = level * (num_blocks + 1)
        if part != 'resample':
            number, member = first + rest.pop(0) + (direction == 'down'), ('blocks', 'attentions').index(part)
        elif direction == 'down':
            number, member = first + num_blocks + 1, 0
        else:
            number, member = first + num_blocks, 1 + attends[len(attends) - 1 - level]
        place = f'{"input" if direction == "down" else "output"}_blocks.{number}.{member}'
        if part == 'resample' and len(rest) == 1:  # a convolution
            place += '.op' if direction == 'down' else '.conv'
        inside = tuple(rest)
    torch = 'weight' if leaf in ('kernel', 'scale') else str(leaf)
    if layer in QKV:
        return (f'{place}.qkv.{torch}[{layer}]',)
    return ('.'.join([place, *(IN_BLOCK.get(part, str(part)) for part in inside[:-1]), torch]),)


def split(
    tensors: Mapping[str, np.ndarray], path: str, *, num_heads: int, head_channels: int, order: str
) -> dict[str, np.ndarray]:
    """Return the tensors with queries, keys and values apart, as NAME[query], NAME[key] and NAME[value].

    Their rows are sorted by head and then by what they are in the order 'legacy', and the other way in 'new'
    (QKVAttentionLegacy and QKVAttention of guided-diffusion). A convolution over one pixel becomes a linear layer.

    Args:
        tensors: {name: tensor}.
        path: the file, for errors.
        num_heads: attention heads, if `head_channels` is 0.
        head_channels: channels of each head.
        order: 'legacy', 'new', or '' if that is unknown.

    Raises:
        ValueError: the heads or their order are not given, or do not fit.
    """
    if not num_heads and not head_channels:
        raise ValueError(
            f'{path} does not say how many attention heads its network has: set config.model.num_heads (their '
            'num_heads; 4 if they had no such flag) or config.model.head_channels (their num_head_channels)'
        )
    parts = {}
    for name, tensor in tensors.items():
        if name.endswith('.proj_out.weight') and tensor.ndim == 3:
            tensor = tensor[..., 0]
        found = re.fullmatch(r'(.*\.qkv\.)(weight|bias)', name)
        if not found:
            parts[name] = tensor
            continue
        if not tensor.size or (tensor.ndim < 2 if found[2] == 'weight' else tensor.ndim != 1):
            raise ValueError(f'{path}: {name} has shape {tensor.shape}, but queries, keys and values were expected')
        width, rest = len(tensor) // 3, len(tensor) % 3
        heads, remainder = divmod(width, head_channels) if head_channels else (num_heads, width % num_heads)
        if rest or remainder or not heads:
            asked = f'head_channels={head_channels}' if head_channels else f'num_heads={num_heads}'
            raise ValueError(f'{path}: {name} has {len(tensor)} rows, which config.model.{asked} does not divide')
        if heads > 1 and not order:
            raise ValueError(
                f'{path} does not say in which order its queries, keys and values are: set '
                "config.interop.attention_order to 'new' if the network was trained with "
                "use_new_attention_order=True, else to 'legacy'"
            )
        shape = (3, heads) if order == 'new' else (heads, 3)
        rows = tensor.reshape(*shape, width // heads, -1)
        if order != 'new':
            rows = rows.swapaxes(0, 1)
        for part, values in zip(QKV, rows, strict=True):
            parts[f'{name}[{part}]'] = values.reshape((width, -1) if found[2] == 'weight' else width)
    return parts


def network_settings(tensors: Mapping[str, np.ndarray], path: str, image_size: int) -> dict[str, dict[str, Any]]:
    """Return the parts 'data' and 'model' of our config, from the names and shapes of their tensors.

    Args:
        tensors: {name: tensor}.
        path: the file, for errors.
        image_size: in pixels.

    Raises:
        ValueError: the tensors are not those of their network, or the image size is missing.
    """
    outputs = _numbers(tensors, r'output_blocks\.(\d+)\.')
    if not outputs and _numbers(tensors, r'input_blocks\.(\d+)\.'):
        raise ValueError(f'{path} has no output_blocks: it is a classifier, and only networks that draw are imported')
    width_in, image_channels = _shape('input_blocks.0.0.weight', 4, tensors, path)[:2]
    if image_channels not in (1, 3):
        raise ValueError(
            f'{path} takes {image_channels} channels: networks that enlarge images, which also take the small image, '
            'are not supported'
        )
    out_channels = _shape('out.2.weight', 4, tensors, path)[0]
    if out_channels not in (image_channels, 2 * image_channels):
        raise ValueError(
            f'{path} takes {image_channels} channels and returns {out_channels}: once or twice as many were expected'
        )
    # Only decoders tell residual blocks that change the size from others.
    resized = _numbers(tensors, r'output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.0)\.weight')
    num_blocks = resized[0] if resized else len(outputs) - 1
    levels = range(len(outputs) // (num_blocks + 1))
    firsts = [1 + level * (num_blocks + 1) for level in levels]
    widths = [_shape(f'input_blocks.{first}.0.out_layers.3.weight', 4, tensors, path)[0] for first in firsts]
    emb_dim, channels = _shape('time_embed.0.weight', 2, tensors, path)
    if emb_dim != 4 * channels or any(width % channels for width in widths) or width_in != widths[0]:
        raise ValueError(
            f'{path}: the first convolution is {width_in} wide and the resolutions are {widths}, but they must be '
            f'multiples of the {channels} channels of the time embedding, the first two equal'
            + (' (the published network for 512×512 is not supported for that)' if 2 * width_in == channels else '')
        )
    require_image_size(path, image_size)
    embedded = _shape('middle_block.0.emb_layers.1.weight', 2, tensors, path)[0]
    num_classes = _shape('label_emb.weight', 2, tensors, path)[0] if 'label_emb.weight' in tensors else 0
    model = {
        **FIXED,
        'channels': channels,
        'multipliers': tuple(width // channels for width in widths),
        'num_blocks': num_blocks,
        'attention_resolutions': tuple(
            image_size >> level
            for level, first in zip(levels, firsts, strict=True)
            if f'input_blocks.{first}.1.qkv.weight' in tensors
        ),
        'scale_shift_norm': embedded == 2 * widths[-1],
        'resblock_updown': any(
            f'output_blocks.{number}.{member}.in_layers.0.weight' in tensors for number in resized for member in (1, 2)
        ),
        'num_classes': num_classes,
        'variance': 'fixed' if out_channels == image_channels else 'learned',
    }
    return {'data': {'image_size': image_size, 'channels': image_channels}, 'model': model}


def _numbers(tensors, pattern):
    """The numbers that a pattern finds in the beginnings of names, in order."""
    return sorted({int(found[1]) for name in tensors if (found := re.match(pattern, name))})


def _shape(name, ndim, tensors, path):
    """The shape of a tensor. Raises ValueError if it is not as expected."""
    shape = tensors[name].shape if name in tensors else None
    if shape is None or len(shape) != ndim or 0 in shape:
        found = 'is missing' if shape is None else f'has shape {shape}'
        raise ValueError(
            f'{path} is not a network of improved-diffusion or guided-diffusion: {name} {found}, but {ndim} axes were '
            'expected'
        )
    return shape
