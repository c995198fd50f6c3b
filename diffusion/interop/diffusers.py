"""Reads folders of diffusers: a pipeline of UNet2DModel and DDPMScheduler or DDIMScheduler, or a UNet2DModel alone.

    model_index.json
    unet/config.json       unet/diffusion_pytorch_model.safetensors (or in parts, with an index; or a .bin)
    unet_ema/ (only in the checkpoints of diffusers' training scripts)
    scheduler/scheduler_config.json

Older pipelines have the same files without subfolders. diffusers is not needed, and PyTorch only for a .bin.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion.interop import hub
from diffusion.interop.tensors import Found, Path, with_no_class
from diffusion.interop.weights import load_torch, read_safetensors, state_dict
from diffusion.util import read_json

WEIGHTS = 'diffusion_pytorch_model.safetensors'

# Parts of our parameters' paths → parts of their names.
NAMES = {
    'time1': 'time_embedding.linear_1',
    'time2': 'time_embedding.linear_2',
    'label': 'class_embedding',
    'time': 'time_emb_proj',
    'down': 'down_blocks',
    'up': 'up_blocks',
    'mid1': 'mid_block.resnets.0',
    'mid2': 'mid_block.resnets.1',
    'mid_attention': 'mid_block.attentions.0',
    'blocks': 'resnets',
    'shortcut': 'conv_shortcut',
    'norm': 'group_norm',
    'query': 'to_q',
    'key': 'to_k',
    'value': 'to_v',
    'out': 'to_out.0',
    'norm_out': 'conv_norm_out',
    'kernel': 'weight',
    'scale': 'weight',
}
OLD_NAMES = NAMES | {'query': 'query', 'key': 'key', 'value': 'value', 'out': 'proj_attn'}

# Keys for which our network has one choice: {key: (diffusers' default, accepted values)}.
NETWORK_KEYS: dict[str, tuple[Any, tuple]] = {
    'center_input_sample': (False, (False,)),
    'time_embedding_type': ('positional', ('positional',)),
    'mid_block_type': ('UNetMidBlock2D', ('UNetMidBlock2D',)),
    'mid_block_scale_factor': (1, (1,)),
    'act_fn': ('silu', ('silu', 'swish')),
    'class_embed_type': (None, (None,)),
}
# Whether a scheduler is DDPM's. The parallel schedulers compute the same steps.
SCHEDULERS = {
    'DDPMScheduler': True,
    'DDPMParallelScheduler': True,
    'DDIMScheduler': False,
    'DDIMParallelScheduler': False,
}
SCHEDULER_KEYS: dict[str, tuple[Any, tuple]] = {
    'thresholding': (False, (False,)),
    'clip_sample_range': (1.0, (1.0,)),
    'set_alpha_to_one': (True, (True,)),
    'steps_offset': (0, (0,)),
}
# Keys for how images are drawn or how large they are, on which the training of the weights does not depend.
NOT_TRAINED = (
    'clip_sample',
    'clip_sample_range',
    'sample_size',
    'set_alpha_to_one',
    'steps_offset',
    'thresholding',
    'timestep_spacing',
    'variance_type',
)
# Keys in the config.json of unet_ema, which describe the average and not the network.
EMA_KEYS = (
    'decay',
    'inv_gamma',
    'min_decay',
    'optimization_step',
    'power',
    'update_after_step',
    'use_ema_warmup',
)
# Their value → ours.
EMBEDDING_ORDERS = {True: 'cos_sin', False: 'sin_cos'}  # flip_sin_to_cos
SCALE_SHIFT = {'default': False, 'scale_shift': True}  # resnet_time_scale_shift
ZERO_OR_ONE = {0: 0, 1: 1}  # freq_shift, downsample_padding
BOOLEAN = {False: False, True: True}  # rescale_betas_zero_snr, add_attention
BY_BLOCKS = {'conv': False, 'resnet': True}  # downsample_type, upsample_type
SCHEDULES = {
    'linear': 'linear',
    'scaled_linear': 'quadratic',
    'squaredcos_cap_v2': 'cosine',
    'sigmoid': 'sigmoid',
}
KINDS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
# 'auto' is the large variance for η = 1 and the small one otherwise, as in diffusers' two schedulers.
# If the model learns the variance, 'auto' means the learned one for η = 1.
VARIANCES = {'fixed_small': 'small', 'fixed_small_log': 'small', 'fixed_large': 'auto', 'learned_range': 'auto'}
SPACINGS = {'leading': 'leading', 'trailing': 'trailing', 'linspace': 'linspace'}


def names(path: Path) -> tuple[str, ...]:
    """Return the names that a parameter may have in their files, the current one first."""
    block = path[-2] != 'resample'  # else a convolution
    resample = {'resample': f'{path[0]}samplers.0' + '.conv' * (not block)}
    return tuple('.'.join((table | resample).get(part, str(part)) for part in path) for table in (NAMES, OLD_NAMES))


def read(place: str, *, image_size: int = 0) -> Found:
    """Read a folder, or a repository of the Hugging Face hub.

    Args:
        place: the folder, or a hub id such as 'google/ddpm-cifar10-32'.
        image_size: height and width of the images in pixels, used if the files do not state it.

    Returns:
        What the files hold. Without a scheduler's file, the settings have no 'schedule' and no 'sample'. The weights
        include 'ema' if there is a folder unet_ema.

    Raises:
        ValueError: a file cannot be read, or has a value that our network and schedules cannot express; the message
            names the file and the key or tensor.
    """
    folder = place if os.path.isdir(place) else hub.download_pipeline(place)
    unet = _find(folder, 'unet', 'config.json')
    ema = os.path.join(folder, 'unet_ema', 'config.json')
    scheduler = _find(folder, 'scheduler', 'scheduler_config.json')
    settings, betas = network_settings(_read_json(unet), unet, image_size), None
    configs = {'params': unet} | ({'ema': ema} if os.path.exists(ema) else {})
    if 'ema' in configs and network_settings(_read_json(ema), ema, image_size) != settings:
        raise ValueError(f'{ema} describes another network than {unet}')
    if os.path.exists(scheduler):
        values = _read_json(scheduler)
        theirs = scheduler_settings(values, scheduler)
        _check_variance(values, scheduler, settings['model']['variance'])
        for part, keys in theirs.items():
            settings[part] = settings.get(part, {}) | keys
        betas = values.get('trained_betas')
    weights = {which: read_tensors(os.path.dirname(config)) for which, config in configs.items()}
    for tensors in weights.values():
        if (embedding := tensors.get('class_embedding.weight', np.zeros(()))).ndim == 2:
            tensors['class_embedding.weight'] = with_no_class(embedding)
    return Found(settings, weights, names, {}, betas)


def _find(folder: str, part: str, file: str) -> str:
    """Return the path of a file in its subfolder, or in the folder itself."""
    inside = os.path.join(folder, part, file)
    return inside if os.path.exists(inside) else os.path.join(folder, file)


def _read_json(path: str) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read ({error}); every folder that diffusers saved has it') from error
    if not isinstance(value, dict):
        raise ValueError(f'{path} does not hold a JSON object')
    return value


class _Keys:
    """The keys of a JSON file. Each is read once, and `refuse_others` refuses the rest."""

    def __init__(self, values: Mapping[str, Any], path: str):
        self._values = {key: value for key, value in values.items() if not key.startswith('_')}
        self._path = path

    def get(self, key: str, default: Any) -> Any:
        return self._values.pop(key, default)

    def choose(self, key: str, default: Any, table: Mapping[Any, Any]) -> Any:
        """Return the table's entry for a key's value."""
        value = self.get(key, default)
        if type(value) is not type(default) or value not in table:
            raise self.error(key, value, f'must be one of {", ".join(map(repr, table))}')
        return table[value]

    def positive_integer(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, value, 'must be a positive integer')
        return value

    def require(self, table: Mapping[str, tuple[Any, tuple]]) -> None:
        """Raise ValueError if the value of a key is not among those that the table accepts."""
        for key, (default, accepted) in table.items():
            value = self.get(key, default)
            if value not in accepted:
                raise self.error(key, value, f'here it is always {" or ".join(map(repr, accepted))}')

    def refuse_others(self, ignored: Iterable[str]) -> None:
        """Raise ValueError for a key that has a value and was not read."""
        for key, value in self._values.items():
            if key not in ignored and value is not None:
                raise self.error(key, value, 'the key is unknown: delete it only if diffusers warns that it ignores it')

    def error(self, key: str, value: Any, problem: str) -> ValueError:
        shown = repr(value) if len(repr(value)) <= 200 else f'{repr(value)[:200]} …'
        message = f'{self._path}: {key} is {shown}, but {problem}'
        if key not in NOT_TRAINED:
            message += (
                '. Weights that were trained with it cannot be imported; editing the file would not change what they '
                'have learned, only make the network compute something else'
            )
        elif key in SCHEDULER_KEYS:
            message += '. The weights do not depend on it: remove the key from scheduler_config.json to import them'
        return ValueError(message)


def network_settings(values: Mapping[str, Any], path: str, image_size: int = 0) -> dict[str, dict[str, Any]]:
    """Return the parts 'data' and 'model' of our config for a UNet2DModel's config.json.

    Args:
        values: the content of the file.
        path: the file, for errors.
        image_size: used if the file has no sample_size; 0 if that is an error.

    Raises:
        ValueError: our network cannot express it.
    """
    name = values.get('_class_name')
    if name != 'UNet2DModel':
        raise ValueError(f"{path}: _class_name is {name!r}, but only 'UNet2DModel' is supported")
    keys = _Keys(values, path)
    keys.require(NETWORK_KEYS)
    size, channels = keys.get('sample_size', None), keys.positive_integer('in_channels', 3)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is None:
        size = image_size or None
    if type(size) is not int:
        raise keys.error('sample_size', size, 'must be square, such as 32 or [32, 32]; null is config.data.image_size')
    if (out := keys.get('out_channels', 3)) not in (channels, 2 * channels):
        problem = f'must be in_channels, {channels}, or {2 * channels} for a learned variance'
        raise keys.error('out_channels', out, problem)
    widths = keys.get('block_out_channels', [224, 448, 672, 896])
    if not isinstance(widths, list) or not widths or not all(type(width) is int and width > 0 for width in widths):
        raise keys.error('block_out_channels', widths, 'must be a list of positive integers')
    if any(width % widths[0] for width in widths):
        raise keys.error('block_out_channels', widths, f'all must be multiples of the first, {widths[0]}')
    if (dim := keys.get('time_embedding_dim', None)) not in (None, 4 * widths[0]):
        raise keys.error('time_embedding_dim', dim, f'must be {4 * widths[0]}, four times the first width')
    blocks = _blocks(keys, len(widths))
    attends = [block.attends for block in blocks['down']]
    mid_attention = keys.choose('add_attention', True, BOOLEAN)
    updown = _updown(keys, blocks)
    groups = keys.positive_integer('norm_num_groups', 32)
    scale_shift = keys.choose('resnet_time_scale_shift', 'default', SCALE_SHIFT)
    # Without this key, their attention in the middle has no norm if blocks have scale and shift.
    own = keys.get('attn_norm_num_groups', None)
    if mid_attention and own not in ((groups,) if scale_shift else (None, groups)):
        raise keys.error('attn_norm_num_groups', own, f'must be norm_num_groups, {groups}')
    if (num_classes := keys.get('num_class_embeds', None)) is None:
        num_classes = 0
    elif type(num_classes) is not int or num_classes < 1:
        raise keys.error('num_class_embeds', num_classes, 'must be null or a positive integer')
    head_channels = keys.get('attention_head_dim', 8)
    if head_channels is not None and (type(head_channels) is not int or head_channels < 1):
        raise keys.error('attention_head_dim', head_channels, 'must be null or a positive integer')
    attended = {width for width, a in zip([*widths, widths[-1]], [*attends, mid_attention], strict=True) if a}
    if attended == {head_channels}:
        head_channels = None  # one head everywhere
    epsilon = keys.get('norm_eps', 1e-5)
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise keys.error('norm_eps', epsilon, 'must be a number in (0, 1)')
    settings = {
        'data': {'image_size': size, 'channels': channels},
        'model': {
            'network': 'adm' if scale_shift or updown else 'unet',
            'variance': 'learned' if out == 2 * channels else 'fixed',
            'channels': widths[0],
            'multipliers': tuple(width // widths[0] for width in widths),
            'num_blocks': keys.positive_integer('layers_per_block', 2),
            'attention_resolutions': tuple(size >> level for level, a in enumerate(attends) if a),
            'groups': groups,
            'dropout': keys.get('dropout', 0.0),
            'first_level': 0,
            'level_scale': 1.0,
            'num_classes': num_classes,
            'head_channels': head_channels or 0,
            'norm_epsilon': float(epsilon),
            'mid_attention': mid_attention,
            'downsample_padding': keys.choose('downsample_padding', 1, ZERO_OR_ONE),
            'embedding_order': keys.choose('flip_sin_to_cos', True, EMBEDDING_ORDERS),
            'embedding_shift': keys.choose('freq_shift', 0, ZERO_OR_ONE),
        },
    }
    if settings['model']['network'] == 'adm':
        settings['model'] |= {'scale_shift_norm': scale_shift, 'resblock_updown': bool(updown), 'num_heads': 0}
        settings['model'] |= {'updown_levels': updown} if updown else {}
    keys.refuse_others(ignored=('num_train_timesteps', *EMA_KEYS))
    return settings


class _Block(NamedTuple):
    """What a type of block says: whether it has attention, and whether a residual block follows that changes the size.

    The latter is None where downsample_type or upsample_type says it.
    """

    attends: bool
    by_blocks: bool | None


BLOCKS = {
    'down': {
        'DownBlock2D': _Block(False, False),
        'AttnDownBlock2D': _Block(True, None),
        'ResnetDownsampleBlock2D': _Block(False, True),
    },
    'up': {
        'UpBlock2D': _Block(False, False),
        'AttnUpBlock2D': _Block(True, None),
        'ResnetUpsampleBlock2D': _Block(False, True),
    },
}


def _blocks(keys: _Keys, levels: int) -> dict[str, list[_Block]]:
    """Return the blocks of encoder and decoder, the finest level first; they must have attention at the same levels."""
    blocks = {}
    for direction, table in BLOCKS.items():
        plain, attention, _ = table
        default = [attention] * 3 + [plain] if direction == 'up' else [plain] + [attention] * 3
        types = keys.get(f'{direction}_block_types', default)
        known = isinstance(types, list) and all(isinstance(block, str) and block in table for block in types)
        if not known or len(types) != levels:
            names = ', '.join(map(repr, table))
            problem = f'must list {levels} of {names}, as many as block_out_channels'
            raise keys.error(f'{direction}_block_types', types, problem)
        blocks[direction] = [table[block] for block in (types if direction == 'down' else types[::-1])]
    if any(up.attends != down.attends for down, up in zip(blocks['down'], blocks['up'], strict=True)):
        raise keys.error('up_block_types', types, 'must have attention at the same resolutions as down_block_types')
    return blocks


def _updown(keys: _Keys, blocks: dict[str, list[_Block]]) -> str:
    """Return the levels at which residual blocks change the size, 'all' or 'attention'; '' for none."""
    chosen = {way: keys.choose(f'{way}sample_type', 'conv', BY_BLOCKS) for way in ('down', 'up')}
    # The coarsest level of the encoder and the finest of the decoder change no size.
    changing = [*(('down', block) for block in blocks['down'][:-1]), *(('up', block) for block in blocks['up'][1:])]
    found = [chosen[way] if block.by_blocks is None else block.by_blocks for way, block in changing]
    for levels, ours in (
        ('', [False for _ in changing]),
        ('all', [True for _ in changing]),
        ('attention', [block.attends for _, block in changing]),
    ):
        if found == ours:
            return levels
    raise keys.error(
        'upsample_type',
        'resnet' if chosen['up'] else 'conv',
        'with downsample_type and the types of the blocks, the size must be changed by convolutions everywhere, by '
        'residual blocks everywhere, or by residual blocks exactly at the resolutions with attention',
    )


def scheduler_settings(values: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Return the parts 'model' (its kind), 'schedule' and 'sample' of our config for a scheduler_config.json.

    If it lists trained_betas, these define the schedule, and the settings do not name one.

    Args:
        values: the content of the file.
        path: the file, for errors.

    Raises:
        ValueError: our schedules and samplers cannot express it.
    """
    name = values.get('_class_name')
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f'{path}: _class_name is {name!r}, but must be one of {", ".join(map(repr, SCHEDULERS))}')
    keys = _Keys(values, path)
    T = keys.positive_integer('num_train_timesteps', 1000)
    stochastic = SCHEDULERS[name]
    predict_epsilon = keys.get('predict_epsilon', None)  # of older files
    if predict_epsilon is not None and not isinstance(predict_epsilon, bool):
        raise keys.error('predict_epsilon', predict_epsilon, 'must be true, false or null')
    kind = 'sample' if predict_epsilon is False else 'epsilon'
    clip = keys.get('clip_sample', True)
    if not isinstance(clip, bool):
        raise keys.error('clip_sample', clip, 'must be true or false')
    spacing = keys.choose('timestep_spacing', 'leading', SPACINGS)
    # A scheduler that is made from another one's config keeps keys that it does not use.
    unused = ['set_alpha_to_one'] if stochastic else ['variance_type']
    unused += ['clip_sample_range'] * (not clip) + ['steps_offset'] * (spacing != 'leading')
    keys.require({key: value for key, value in SCHEDULER_KEYS.items() if key not in unused})
    schedule = {'T': T, 'beta_start': keys.get('beta_start', 1e-4), 'beta_end': keys.get('beta_end', 0.02)}
    schedule['zero_terminal_snr'] = keys.choose('rescale_betas_zero_snr', False, BOOLEAN)
    betas = keys.get('trained_betas', None)
    if betas is None:
        schedule['name'] = keys.choose('beta_schedule', 'linear', SCHEDULES)
        schedule |= {'offset': 0.008, 'max_beta': 0.999}
    else:
        _check_betas(betas, T, path)
        unused.append('beta_schedule')
    settings = {
        'model': {'kind': keys.choose('prediction_type', kind, KINDS)},
        'schedule': schedule,
        'sample': {
            'num_steps': min(T, 1000 if stochastic else 50),  # the defaults of their pipelines
            'eta': 1.0 if stochastic else 0.0,
            'variance': keys.choose('variance_type', 'fixed_small', VARIANCES) if stochastic else 'small',
            'clip': clip,
            'spacing': spacing,
        },
    }
    keys.refuse_others(
        ignored=('tensor_format', 'timestep_values', 'dynamic_thresholding_ratio', 'sample_max_value', *unused)
    )
    return settings


def _check_variance(values: Mapping[str, Any], path: str, ours: str) -> None:
    """Raise ValueError unless a DDPM's scheduler, of a known class, uses what the network outputs."""
    theirs = values.get('variance_type', 'fixed_small')
    if SCHEDULERS[values['_class_name']] and (theirs == 'learned_range') != (ours == 'learned'):
        outputs = 'as many output channels again' if ours == 'learned' else 'none'
        raise ValueError(
            f'{path}: variance_type is {theirs!r}, but the network has {outputs} for a learned variance: diffusers '
            "needs 'learned_range' with 2·in_channels output channels, and only then"
        )


def _check_betas(betas: Any, T: int, path: str) -> None:
    if not isinstance(betas, list) or not all(type(beta) in (int, float) and 0 < beta <= 1 for beta in betas):
        raise ValueError(f'{path}: trained_betas must be a list of numbers in (0, 1]')
    if len(betas) != T:
        raise ValueError(f'{path}: trained_betas has {len(betas)} numbers, but num_train_timesteps is {T}')


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """Return {name: tensor} of the network's weights, from one file or from several.

    Raises:
        ValueError: there are none, or a file cannot be read.
    """
    path = os.path.join(folder, WEIGHTS)
    index = path + '.index.json'
    if os.path.exists(path):
        return read_safetensors(path)
    if os.path.exists(index):
        return _read_parts(index)
    old = os.path.join(folder, 'diffusion_pytorch_model.bin')
    if os.path.exists(old):
        return state_dict(load_torch(old), old)
    found = sorted(name for name in os.listdir(folder) if name.endswith(('.safetensors', '.bin', '.index.json')))
    raise ValueError(
        f'{folder} has no {WEIGHTS}, but {", ".join(found[:4]) or "no weights"}{", …" if found[4:] else ""}: '
        'save the network there with save_pretrained and its default options'
    )


def _read_parts(index: str) -> dict[str, np.ndarray]:
    """Read weights from several files; `index` lists the file of each tensor."""
    places = _read_json(index).get('weight_map')
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f'{index} has no weight_map from tensors to files')
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        if file != os.path.basename(file) or file in ('', '..'):
            raise ValueError(f'{index} points outside its folder, to {file!r}')
        part = read_safetensors(os.path.join(os.path.dirname(index), file))
        listed = {name for name, place in places.items() if place == file}
        if listed != set(part):
            raise ValueError(f'{index} and {file} differ in which tensors it holds: {sorted(listed ^ set(part))[:8]}')
        tensors |= part
    return tensors
