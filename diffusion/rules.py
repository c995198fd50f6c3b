"""The rules of the config: what each key may be; what it means stands in configs/default.py."""

import math

COUNT = 2**31 - 1  # steps and images are counted in 32 bits


def integers(low, high=COUNT, why=''):
    """Whole numbers from low to high; why not beyond."""
    return lambda value: low <= value <= high, f'at least {low}' if high == COUNT else f'from {low} to {high}{why}'


def numbers(low, high=math.inf, *, ends='[]'):
    """Real numbers from low to high, with or without the ends, as intervals are written; finite in any case."""

    def good(value):
        above = low <= value if ends[0] == '[' else low < value
        below = value <= high if ends[1] == ']' else value < high
        return math.isfinite(value) and above and below

    return good, f'in {ends[0]}{low:g}, {high:g}{ends[1]}'


def one_of(*values):
    """One of a few values."""
    return lambda value: value in values, f'one of {", ".join(map(repr, values))}'


RULES = {
    'seed': integers(0),
    'data.image_size': integers(0, 4096),
    'data.channels': one_of(0, 1, 3),
    'data.crop': one_of('', 'center', 'center_140', 'ddim'),
    'data.max_bad_fraction': numbers(0, 1),
    'data.placement': one_of('auto', 'device', 'host'),
    'model.kind': one_of('eps', 'x0', 'v'),
    'model.channels': integers(0, 2**16),
    'model.num_blocks': integers(1, 64),
    'model.groups': integers(1, 2**16),
    'model.dropout': numbers(0, 1, ends='[)'),
    'model.first_level': one_of(0, 1),
    'model.dtype': one_of('float32', 'bfloat16'),
    'schedule.T': integers(1, 10_000, ': β is a difference of log ᾱ, and for more levels float32 does not carry it'),
    'schedule.beta_start': numbers(0, 1),
    'schedule.beta_end': numbers(0, 1),
    'schedule.offset': numbers(0, 1),
    'schedule.max_beta': numbers(0, 1, ends='(]'),
    'train.loss': one_of('simple', 'vlb'),
    'train.batch_size': integers(1),
    'train.accumulate': integers(1),
    'train.num_steps': integers(1),
    'train.learning_rate': numbers(0, ends='()'),
    'train.warmup_steps': integers(0),
    'train.grad_clip': numbers(0, ends='[)'),
    'train.ema_decay': numbers(0, 1, ends='[)'),
    'train.max_bad_steps': integers(1),
    'train.checkpoint_every': integers(1),
    'train.keep_checkpoints': integers(1),
    'train.log_every': integers(1),
    'train.sample_every': integers(0),
    'sample.num_images': integers(1),
    'sample.num_steps': integers(1),
    'sample.eta': numbers(0, 1),
    'sample.spacing': one_of('trailing', 'leading', 'linspace', 'uniform', 'quad'),
    'sample.variance': one_of('small', 'large'),
    'sample.weights': one_of('ema', 'raw'),
    'sample.batch_size': integers(1),
    'sample.seed': integers(0),
    'sample.compat': one_of('', 'diffusers', 'diffusers-ddim', 'ddim', 'ho'),
    'likelihood.num_images': integers(0),
    'likelihood.samples': integers(1),
    'likelihood.num_steps': integers(0),
    'likelihood.levels': integers(0),
    'likelihood.eta': numbers(0, 1),
    'likelihood.variance': one_of('small', 'large'),
    'likelihood.rtol': numbers(0, 1, ends='()'),
    'likelihood.atol': numbers(0, 1, ends='()'),
    'likelihood.probes': integers(-1, 2**16),
    'likelihood.weights': one_of('ema', 'raw'),
    'likelihood.batch_size': integers(1),
    'likelihood.seed': integers(0),
    'interop.weights': one_of('ema', 'raw'),
    'mesh.fsdp': integers(1),
    'distributed.num_processes': integers(0),
    'distributed.process_id': integers(-1),
    'distributed.timeout': integers(1),
    'compile_cache': (lambda value: value.strip() != '', "a folder, 'workdir' or 'off'"),  # '' would be any folder
}


def check(config):
    """Raise ValueError, which names the key, where a value is none that it may have.

    What depends on several keys together is found out where they meet.
    """
    for key, (good, words) in RULES.items():
        value = config[key] if '.' not in key else config[key.split('.')[0]][key.split('.')[1]]
        if not good(value):
            raise ValueError(f'config.{key} is {value!r}, but must be {words}')
    for key in ('multipliers', 'attention_resolutions'):
        value = config.model[key]
        if len(value) > 16 or not all(isinstance(number, int) and 0 < number < 2**16 for number in value):
            raise ValueError(f'config.model.{key} is {value!r}, but must be a few positive whole numbers')
