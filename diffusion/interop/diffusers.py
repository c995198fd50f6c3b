"""Folders of diffusers: a pipeline of UNet2DModel and DDPMScheduler or DDIMScheduler, or a UNet2DModel alone.

    model_index.json
    unet/config.json       unet/diffusion_pytorch_model.safetensors (or in parts, with an index; or a .bin)
    scheduler/scheduler_config.json

The older pipelines have the same files without the two folders. Neither diffusers nor PyTorch is needed.
"""

import json
import os

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion.interop.tensors import FLOATING, Found, from_torch, in_a_line, load_torch, put

WEIGHTS = 'diffusion_pytorch_model.safetensors'

NAMES = {
    'time1': 'time_embedding.linear_1',
    'time2': 'time_embedding.linear_2',
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

# What UNet2DModel can do and our network cannot: {key: (its default there, what is accepted)}.
NETWORK = {
    'center_input_sample': (False, (False,)),
    'time_embedding_type': ('positional', ('positional',)),
    'freq_shift': (0, (1,)),
    'flip_sin_to_cos': (True, (False,)),
    'mid_block_type': ('UNetMidBlock2D', ('UNetMidBlock2D',)),
    'mid_block_scale_factor': (1, (1,)),
    'downsample_padding': (1, (0,)),
    'downsample_type': ('conv', ('conv',)),
    'upsample_type': ('conv', ('conv',)),
    'act_fn': ('silu', ('silu', 'swish')),
    'norm_eps': (1e-5, (1e-6,)),
    'resnet_time_scale_shift': ('default', ('default',)),
    'add_attention': (True, (True,)),
    'class_embed_type': (None, (None,)),
    'num_class_embeds': (None, (None,)),
}
SCHEDULES = {
    'linear': 'linear',
    'scaled_linear': 'quadratic',
    'squaredcos_cap_v2': 'cosine',
    'sigmoid': 'sigmoid',
}
KINDS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
VARIANCES = {'fixed_small': 'small', 'fixed_small_log': 'small', 'fixed_large': 'large'}
SPACINGS = ('leading', 'trailing', 'linspace')
SCHEDULER = {
    'rescale_betas_zero_snr': (False, (False,)),
    'thresholding': (False, (False,)),
    'clip_sample_range': (1.0, (1.0,)),
    'set_alpha_to_one': (True, (True,)),
    'steps_offset': (0, (0,)),
}


def names(path):
    """The names that a parameter of ours may have there, today's first."""
    resample = {'resample': f'{path[0]}samplers.0.conv'}
    return tuple('.'.join((table | resample).get(part, str(part)) for part in path) for table in (NAMES, OLD_NAMES))


def read(place):
    """A folder, or a hub id as 'google/ddpm-cifar10-32', as Found.

    Where there is no scheduler's file, the settings have no 'schedule' and no 'sample'. Raises ValueError, which
    names the file and the key or tensor, for what our network and schedules do not express.
    """
    folder = place if os.path.isdir(place) else download(place)
    parts = {}
    for part, file in (('unet', 'config.json'), ('scheduler', 'scheduler_config.json')):
        inside = os.path.join(folder, part)
        parts[part] = os.path.join(inside if os.path.exists(os.path.join(inside, file)) else folder, file)
    settings, betas = network_settings(read_json(parts['unet']), parts['unet']), None
    if os.path.exists(parts['scheduler']):
        scheduler = read_json(parts['scheduler'])
        for part, values in scheduler_settings(scheduler, parts['scheduler']).items():
            settings[part] = settings.get(part, {}) | values
        betas = scheduler.get('trained_betas')
    return Found(settings, {'params': read_tensors(os.path.dirname(parts['unet']))}, names, {}, betas)


def read_json(path):
    """A file that holds one JSON object."""
    try:
        with open(path, encoding='utf-8') as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read ({error}); a folder of diffusers has it') from error
    if not isinstance(value, dict):
        raise ValueError(f'{path} holds no JSON object')
    return value


class Config:
    """The keys of a JSON file, each read once; `done` refuses the rest."""

    def __init__(self, values, path):
        self._values = {key: value for key, value in values.items() if not key.startswith('_')}
        self._path = path

    def get(self, key, default):
        """The value of a key, or its default there."""
        return self._values.pop(key, default)

    def choose(self, key, default, choices):
        """choices[value], or an error that names the key and the value."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(key, value, f'one of {", ".join(map(repr, choices))} is needed')
        return choices[value]

    def number(self, key, default):
        """A positive integer."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, value, 'a positive integer is needed')
        return value

    def refuse(self, key, value, why):
        shown = repr(value) if len(repr(value)) <= 200 else f'{repr(value)[:200]} …'
        return ValueError(f'{self._path}: {key} is {shown}, which this project does not have; {why}')

    def require(self, table):
        """Raise ValueError where a key is not one of what is accepted."""
        for key, (default, accepted) in table.items():
            value = self.get(key, default)
            if value not in accepted:
                raise self.refuse(key, value, f'{" or ".join(map(repr, accepted))} is needed')

    def done(self, unimportant=()):
        """Raise ValueError for a key that is set and was not read."""
        for key, value in self._values.items():
            if key not in unimportant and value is not None:
                raise self.refuse(key, value, 'the key is not known: delete it if diffusers does not look at it')


def network_settings(values, path):
    """The parts 'data' and 'model' of our config for a UNet2DModel's config.json."""
    name = values.get('_class_name')
    if name != 'UNet2DModel':
        raise ValueError(f"{path}: _class_name is {name!r}, but only a 'UNet2DModel' can be imported")
    config = Config(values, path)
    config.require(NETWORK)
    size, channels = config.get('sample_size', None), config.number('in_channels', 3)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise config.refuse('sample_size', size, 'a square, as 32 or [32, 32], is needed')
    if (out := config.get('out_channels', 3)) != channels:
        raise config.refuse('out_channels', out, f'as many as in_channels, {channels}, are needed: no learned variance')
    widths = config.get('block_out_channels', [224, 448, 672, 896])
    if not isinstance(widths, list) or not widths or not all(type(width) is int and width > 0 for width in widths):
        raise config.refuse('block_out_channels', widths, 'a list of positive integers is needed')
    if any(width % widths[0] for width in widths):
        raise config.refuse('block_out_channels', widths, f'multiples of the first, {widths[0]}, are needed')
    if (dim := config.get('time_embedding_dim', None)) not in (None, 4 * widths[0]):
        raise config.refuse('time_embedding_dim', dim, f'{4 * widths[0]}, four times the first width, is needed')

    attends = {}
    for way, attention, plain in (('down', 'AttnDownBlock2D', 'DownBlock2D'), ('up', 'AttnUpBlock2D', 'UpBlock2D')):
        default = [attention] * 3 + [plain] if way == 'up' else [plain] + [attention] * 3
        types = config.get(f'{way}_block_types', default)
        if not isinstance(types, list) or len(types) != len(widths) or any(t not in (attention, plain) for t in types):
            raise config.refuse(
                f'{way}_block_types',
                types,
                f'{len(widths)} of {plain!r} and {attention!r} are needed, as many as block_out_channels',
            )
        attends[way] = [block == attention for block in types]
    if attends['up'] != attends['down'][::-1]:
        raise ValueError(f'{path}: down_block_types and up_block_types differ in where there is attention')
    groups = config.number('norm_num_groups', 32)
    if (own := config.get('attn_norm_num_groups', None)) not in (None, groups):
        raise config.refuse('attn_norm_num_groups', own, f'norm_num_groups, {groups}, is needed')
    heads = config.get('attention_head_dim', 8)
    if heads is not None:
        attended = {width for width, a in zip(widths, attends['down'], strict=True) if a} | {widths[-1]}
        if type(heads) is not int or attended != {heads}:
            raise config.refuse('attention_head_dim', heads, f'one head is needed: null, for widths {sorted(attended)}')

    settings = {
        'data': {'image_size': size, 'channels': channels},
        'model': {
            'channels': widths[0],
            'multipliers': tuple(width // widths[0] for width in widths),
            'num_blocks': config.number('layers_per_block', 2),
            'attention_resolutions': tuple(size >> level for level, a in enumerate(attends['down']) if a),
            'groups': groups,
            'dropout': config.get('dropout', 0.0),
            'first_level': 0,
        },
    }
    config.done(unimportant=('num_train_timesteps',))
    return settings


def scheduler_settings(values, path):
    """The parts 'model' (its kind), 'schedule' and 'sample' of our config for a scheduler_config.json.

    Where it has trained_betas, which then are its schedule, there is no name among the settings.
    """
    name = values.get('_class_name')
    if name not in ('DDPMScheduler', 'DDIMScheduler'):
        raise ValueError(f"{path}: _class_name is {name!r}, but must be 'DDPMScheduler' or 'DDIMScheduler'")
    config = Config(values, path)
    T = config.number('num_train_timesteps', 1000)
    stochastic = name == 'DDPMScheduler'
    kind = 'epsilon' if config.get('predict_epsilon', True) else 'sample'  # as older files say it
    clip = config.get('clip_sample', True)
    if not isinstance(clip, bool):
        raise config.refuse('clip_sample', clip, 'true or false is needed')
    spacing = config.choose('timestep_spacing', 'leading', dict(zip(SPACINGS, SPACINGS, strict=True)))
    # What this scheduler does not look at: a scheduler made of another one's config keeps the other's keys.
    inert = ['set_alpha_to_one'] if stochastic else ['variance_type']
    inert += ['clip_sample_range'] * (not clip) + ['steps_offset'] * (spacing != 'leading')
    config.require({key: what for key, what in SCHEDULER.items() if key not in inert})
    schedule = {'T': T, 'beta_start': config.get('beta_start', 1e-4), 'beta_end': config.get('beta_end', 0.02)}
    betas = config.get('trained_betas', None)
    if betas is None:
        schedule['name'] = config.choose('beta_schedule', 'linear', SCHEDULES)
        schedule |= {'offset': 0.008, 'max_beta': 0.999}
    else:
        check_betas(betas, T, path)
        inert.append('beta_schedule')
    settings = {
        'model': {'kind': config.choose('prediction_type', kind, KINDS)},
        'schedule': schedule,
        'sample': {
            'num_steps': min(T, 1000 if stochastic else 50),  # as their pipelines have it
            'eta': 1.0 if stochastic else 0.0,
            'variance': config.choose('variance_type', 'fixed_small', VARIANCES) if stochastic else 'small',
            'clip': clip,
            'spacing': spacing,
        },
    }
    config.done(('tensor_format', 'timestep_values', 'dynamic_thresholding_ratio', 'sample_max_value', *inert))
    return settings


def check_betas(betas, T, path):
    """Raise ValueError where trained_betas is no list of T numbers in (0, 1]."""
    if not isinstance(betas, list) or not all(type(beta) in (int, float) and 0 < beta <= 1 for beta in betas):
        raise ValueError(f'{path}: trained_betas is something else than the list of numbers in (0, 1] that is needed')
    if len(betas) != T:
        raise ValueError(f'{path}: trained_betas has {len(betas)} numbers, but num_train_timesteps is {T}')


def read_tensors(folder):
    """{name: tensor} of the network's weights, from one file or from parts. Raises ValueError."""
    path = os.path.join(folder, WEIGHTS)
    index = path + '.index.json'
    if os.path.exists(path):
        return read_safetensors(path)
    if os.path.exists(index):
        return read_parts(index)
    old = os.path.join(folder, 'diffusion_pytorch_model.bin')
    if os.path.exists(old):
        return from_torch(load_torch(old), old)
    found = sorted(name for name in os.listdir(folder) if name.endswith(('.safetensors', '.bin', '.index.json')))
    raise ValueError(
        f'{folder} has no {WEIGHTS}, but {", ".join(found[:4]) or "no weights"}{", …" if found[4:] else ""}: '
        'save the network there with save_pretrained, which writes it unless it is told otherwise'
    )


def read_parts(index):
    """{name: tensor} of weights in several files, of which `index` says what each holds."""
    places = read_json(index).get('weight_map')
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f'{index} has no weight_map from tensors to files')
    tensors = {}
    for file in sorted(set(places.values())):
        if file != os.path.basename(file) or file in ('', '..'):
            raise ValueError(f'{index} points outside its folder, to {file!r}')
        part = read_safetensors(os.path.join(os.path.dirname(index), file))
        said = {name for name, place in places.items() if place == file}
        if said != set(part):
            raise ValueError(f'{index} and {file} differ in where these tensors are: {sorted(said ^ set(part))[:8]}')
        tensors |= part
    return tensors


def read_safetensors(path):
    """{name: tensor} of one file."""
    if not os.path.exists(path):
        raise ValueError(f'{path} is missing')
    try:
        with safe_open(path, framework='np') as file:
            return {name: _read_tensor(file, name, path) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{path} cannot be read{_cut_off(path)} ({error}): fetch it again') from error


def _read_tensor(file, name, path):
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError) as error:  # for what NumPy does not have
        raise ValueError(f'{path} holds {name} as {file.get_slice(name).get_dtype()}, but {FLOATING}') from error


def _cut_off(path):
    """Which tensor is the first that a truncated file does not hold whole; '' if that cannot be told."""
    try:
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            header = json.loads(file.read(min(length, os.path.getsize(path))))
        ends = {entry['data_offsets'][1]: name for name, entry in header.items() if name != '__metadata__'}
        end = min(end for end in ends if 8 + length + end > os.path.getsize(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ''
    return f': it ends within {ends[end]}'


def download(repo):
    """The folder of a hub id. Raises ValueError where it cannot be had."""
    looked = f'{repo} is no folder here'
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f'{looked}; for an id of the Hugging Face hub: pip install huggingface_hub') from error
    patterns = ['*.json', '*diffusion_pytorch_model.safetensors', '*diffusion_pytorch_model-*.safetensors']
    try:
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns)
        if not any(name.endswith('.safetensors') for _, _, files in os.walk(folder) for name in files):
            folder = huggingface_hub.snapshot_download(repo, allow_patterns=['*.json', '*diffusion_pytorch_model.bin'])
    except Exception as error:  # of the network, the hub, the id's form
        raise ValueError(f'{looked}, nor could it be had from the hub ({in_a_line(error)})') from error
    return folder


def write(folder, params, *, network, scheduler):
    """Write a pipeline that diffusers' DDPMPipeline and DDIMPipeline load as it is.

    params: of a network that hears timesteps 0 … T−1; network, scheduler: as `network_config` and
    `scheduler_config` give them.
    """
    unet = os.path.join(folder, 'unet')
    os.makedirs(unet, exist_ok=True)
    save_file(put(params, names), os.path.join(unet, WEIGHTS), metadata={'format': 'pt'})
    write_json(os.path.join(unet, 'config.json'), network)
    write_json(os.path.join(folder, 'scheduler', 'scheduler_config.json'), scheduler)
    index = {'unet': ['diffusers', 'UNet2DModel'], 'scheduler': ['diffusers', 'DDPMScheduler']}
    write_json(os.path.join(folder, 'model_index.json'), {'_class_name': 'DDPMPipeline'} | index)


def write_json(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2)
        file.write('\n')


def network_config(
    *, image_size, image_channels, channels, multipliers, num_blocks, attention_resolutions, groups, dropout
):
    """The config.json of a UNet2DModel that is our network. Raises ValueError where there is none."""
    if multipliers[0] != 1:
        raise ValueError(
            f'multipliers is {tuple(multipliers)}, but a UNet2DModel of diffusers begins at the width of its first '
            'resolution: only networks whose first multiplier is 1 can be exported'
        )
    attends = [image_size >> level in attention_resolutions for level in range(len(multipliers))]
    return {
        '_class_name': 'UNet2DModel',
        'sample_size': image_size,
        'in_channels': image_channels,
        'out_channels': image_channels,
        'block_out_channels': [channels * m for m in multipliers],
        'layers_per_block': num_blocks,
        'down_block_types': ['AttnDownBlock2D' if a else 'DownBlock2D' for a in attends],
        'up_block_types': ['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)],
        'norm_num_groups': groups,
        'attention_head_dim': None,
        'dropout': dropout,
        **{key: accepted[0] for key, (_, accepted) in NETWORK.items()},
    }


def scheduler_config(*, name, T, beta_start, beta_end, betas, kind, variance, clip, spacing):
    """The config of a DDPMScheduler, which a DDIMPipeline makes a DDIMScheduler of.

    betas: (T,), for schedules that both schedulers do not have by name; name: ours, or None for those;
    spacing: 'leading' is written for one that diffusers does not have.
    """
    theirs = {ours: theirs for theirs, ours in SCHEDULES.items() if theirs != 'sigmoid'}  # of DDPMScheduler alone
    return {
        '_class_name': 'DDPMScheduler',
        'num_train_timesteps': T,
        'beta_schedule': theirs.get(name, 'linear'),
        'beta_start': beta_start,
        'beta_end': beta_end,
        'trained_betas': None if name in theirs else [float(beta) for beta in betas],
        'prediction_type': {ours: theirs for theirs, ours in KINDS.items()}[kind],
        'variance_type': f'fixed_{variance}',
        'clip_sample': clip,
        'timestep_spacing': spacing if spacing in SPACINGS else 'leading',
    }
