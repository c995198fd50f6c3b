"""Writes folders that the DDPMPipeline and the DDIMPipeline of diffusers load without changes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.interop.diffusers import (
    BLOCKS,
    BY_BLOCKS,
    EMBEDDING_ORDERS,
    KINDS,
    NETWORK_KEYS,
    SCALE_SHIFT,
    SCHEDULES,
    SPACINGS,
    WEIGHTS,
    names,
)
from diffusion.interop.tensors import to_tensors
from diffusion.interop.weights import write_safetensors
from diffusion.util import write_json


def write(folder: str, params: Mapping[Any, Any], *, network: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Write a pipeline; for a conditional network without its index, because no pipeline passes classes.

    Args:
        folder: where the pipeline is written; it is created if it does not exist.
        params: the parameters of a network that is called with timesteps 0 … T−1.
        network: the result of `network_config`.
        scheduler: the result of `scheduler_config`.

    Raises:
        OSError, safetensors.SafetensorError: a file cannot be written.
    """
    unet = os.path.join(folder, 'unet')
    tensors = to_tensors(params, names)
    if (num_classes := network['num_class_embeds']) is not None:
        tensors['class_embedding.weight'] = np.ascontiguousarray(tensors['class_embedding.weight'].T[:num_classes])
    write_safetensors(os.path.join(unet, WEIGHTS), tensors, {'format': 'pt'})
    write_json(os.path.join(unet, 'config.json'), network)
    write_json(os.path.join(folder, 'scheduler', 'scheduler_config.json'), scheduler)
    if num_classes is not None:
        return
    index = {'unet': ['diffusers', 'UNet2DModel'], 'scheduler': ['diffusers', 'DDPMScheduler']}
    write_json(os.path.join(folder, 'model_index.json'), {'_class_name': 'DDPMPipeline'} | index)


def network_config(
    *,
    image_size: int,
    image_channels: int,
    channels: int,
    multipliers: Sequence[int],
    num_blocks: int,
    attention_resolutions: Sequence[int],
    groups: int,
    dropout: float,
    head_channels: int,
    norm_epsilon: float,
    downsample_padding: int,
    embedding_order: str,
    embedding_shift: int,
    network: str = 'unet',
    scale_shift_norm: bool = False,
    resblock_updown: bool = False,
    updown_levels: str = 'all',
    mid_attention: bool = True,
    num_heads: int = 0,
    level_scale: float = 1.0,
    variance: str = 'fixed',
    num_classes: int = 0,
    no_class: bool = False,
) -> dict[str, Any]:
    """Return the config.json of the UNet2DModel that equals our network.

    The arguments are keys of config.model; of a conditional network, `no_class` is whether its row of no class was
    trained, and is exported as one more class.

    Raises:
        ValueError: no UNet2DModel equals it.
    """
    if multipliers[0] != 1:
        raise ValueError(
            f'multipliers is {tuple(multipliers)}, but its first entry must be 1 for an export: the first convolution '
            'of a UNet2DModel has the width of its first resolution'
        )
    adm = network == 'adm'
    for found, problem in (
        (network not in ('unet', 'adm'), f'network is {network!r}, which diffusers does not have'),
        (level_scale != 1, f'level_scale is {level_scale:g}, but a UNet2DModel takes the levels as they are'),
        (
            adm and num_heads > 1 and not head_channels,
            f'num_heads is {num_heads}, but the heads of a UNet2DModel have equally many channels: head_channels',
        ),
    ):
        if found:
            raise ValueError(problem)
    attends = [image_size >> level in attention_resolutions for level in range(len(multipliers))]
    by_blocks = adm and resblock_updown
    plain = by_blocks and updown_levels == 'all'  # whether blocks without attention have residual blocks as well

    def types(way):
        return [_theirs(BLOCKS[way], (True, None) if a else (False, plain)) for a in attends]

    return {
        '_class_name': 'UNet2DModel',
        'sample_size': image_size,
        'in_channels': image_channels,
        'out_channels': image_channels * (2 if variance == 'learned' else 1),
        'block_out_channels': [channels * m for m in multipliers],
        'layers_per_block': num_blocks,
        'down_block_types': types('down'),
        'up_block_types': types('up')[::-1],
        'downsample_type': _theirs(BY_BLOCKS, by_blocks),
        'upsample_type': _theirs(BY_BLOCKS, by_blocks),
        'add_attention': mid_attention,
        'norm_num_groups': groups,
        'attention_head_dim': head_channels or None,
        'dropout': dropout,
        'norm_eps': norm_epsilon,
        'downsample_padding': downsample_padding,
        'flip_sin_to_cos': _theirs(EMBEDDING_ORDERS, embedding_order),
        'freq_shift': embedding_shift,
        'num_class_embeds': num_classes + no_class if num_classes else None,
        'resnet_time_scale_shift': _theirs(SCALE_SHIFT, adm and scale_shift_norm),
        'attn_norm_num_groups': groups if adm and scale_shift_norm else None,
        **{key: accepted[0] for key, (_, accepted) in NETWORK_KEYS.items()},
    }


def scheduler_config(
    *,
    name: str | None,
    T: int,
    beta_start: float,
    beta_end: float,
    betas: np.ndarray,
    kind: str,
    variance: str,
    clip: bool,
    spacing: str,
    zero_terminal_snr: bool = False,
) -> dict[str, Any]:
    """Return the config of a DDPMScheduler, from which a DDIMPipeline makes its DDIMScheduler.

    Args:
        name: our name of the schedule; None if diffusers has it with other constants.
        T: the number of noise levels.
        beta_start: β_1 of the schedule; ignored if it has none.
        beta_end: β_T of the schedule; ignored if it has none.
        betas: (T,), written if not both schedulers of diffusers have the schedule.
        kind: 'eps', 'x0' or 'v'.
        variance: 'small', 'large' or 'learned'.
        clip: whether the predicted x_0 is clipped.
        spacing: our name of the spacing; one that diffusers does not have is written as 'leading'.
        zero_terminal_snr: whether the schedule of this name was rescaled so that ᾱ_T = 0.

    Returns:
        The content of scheduler_config.json.

    Raises:
        ValueError: diffusers does not have this kind.
    """
    if kind not in KINDS.values():
        raise ValueError(f'kind is {kind!r}, but diffusers has only {", ".join(map(repr, KINDS.values()))}')
    # DDIMScheduler has no sigmoid schedule.
    theirs = {ours: theirs for theirs, ours in SCHEDULES.items() if theirs != 'sigmoid'}
    return {
        '_class_name': 'DDPMScheduler',
        'num_train_timesteps': T,
        'beta_schedule': theirs.get(name or '', 'linear'),
        'beta_start': beta_start,
        'beta_end': beta_end,
        'trained_betas': None if name in theirs else [float(beta) for beta in betas],
        'rescale_betas_zero_snr': zero_terminal_snr,
        'prediction_type': _theirs(KINDS, kind),
        'variance_type': 'learned_range' if variance == 'learned' else f'fixed_{variance}',
        'clip_sample': clip,
        'timestep_spacing': spacing if spacing in SPACINGS else 'leading',
    }


def _theirs(table: Mapping[Any, Any], ours: Any) -> Any:
    """Return their value for one of ours, from a table of theirs → ours."""
    return next(theirs for theirs, value in table.items() if value == ours)
