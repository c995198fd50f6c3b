"""The values that each config key may have. configs/default.py documents the keys.

The values of a key that names an entry of a table are the keys of that table, so they are written nowhere else. Tables
are referenced by name and imported only when a config is checked: the command line's help needs them before JAX is
loaded.
"""

import ast
import functools
import importlib
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol

LARGEST_COUNT = 2**31 - 1  # steps and images are int32


class Limit(Protocol):
    """The values that a key may have."""

    def accepts(self, value: Any) -> bool:
        """Return whether the key may have this value."""

    def __str__(self) -> str:
        """What may follow "must be"."""


class Integers:
    """Whole numbers from low to high."""

    def __init__(self, low: int, high: int = LARGEST_COUNT, reason: str = ''):
        self._low, self._high, self._reason = low, high, reason

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and self._low <= value <= self._high

    def __str__(self) -> str:
        return f'{self._low} to {self._high}{self._reason}'


class Reals:
    """Finite real numbers in an interval; `ends` are its brackets, '[' and ']' for an end that belongs to it."""

    def __init__(self, low: float, high: float = math.inf, ends: str = '[]'):
        self._low, self._high, self._ends = low, high, ends

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, (int, float)):  # within a tuple, whose elements have no type
            return False
        above = self._low <= value if self._ends[0] == '[' else self._low < value
        below = value <= self._high if self._ends[1] == ']' else value < self._high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        return f'in {self._ends[0]}{self._low:g}, {self._high:g}{self._ends[1]}'


class OneOf:
    """One of a few values, or of the keys of tables given as 'module:NAME'."""

    def __init__(self, *values: Any, table: str = ''):
        self._values, self._table = values, table

    def accepts(self, value: Any) -> bool:
        return value in self._values or (bool(self._table) and value in self._imported())

    def __str__(self) -> str:
        return self._one_of(self._imported() if self._table else ())

    def without_imports(self) -> str:
        """The same as `str`, from the source of the table's module."""
        return self._one_of(self._from_source() if self._table else ())

    def _one_of(self, keys):
        return f'one of {", ".join(map(repr, [*self._values, *keys]))}'

    def _imported(self):
        module, name = self._table.split(':')
        return getattr(importlib.import_module(module), name)

    def _from_source(self):
        module, name = self._table.split(':')
        path = os.path.join(os.path.dirname(__file__), *module.split('.')[1:])
        path = os.path.join(path, '__init__.py') if os.path.isdir(path) else f'{path}.py'
        with open(path, encoding='utf-8') as file:
            for node in ast.parse(file.read()).body:
                target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
                table = getattr(node, 'value', None)
                if isinstance(target, ast.Name) and target.id == name and isinstance(table, ast.Dict):
                    return [ast.literal_eval(key) for key in table.keys if key]
        raise LookupError(f'{module} assigns no dict to {name}')


class FolderOr:
    """A path with a slash, so that no misspelt word becomes a folder, or one of a few words."""

    def __init__(self, *words: str):
        self._words = words

    def accepts(self, value: Any) -> bool:
        return '/' in value or value in self._words

    def __str__(self) -> str:
        return f"a folder, with a '/' in its path, or {' or '.join(map(repr, self._words))}"


class NumbersOr:
    """Whole numbers in a text, such as '0,3,7', or one of a few words."""

    def __init__(self, *words: str):
        self._words = words

    def accepts(self, value: Any) -> bool:
        try:
            return value in self._words or all(0 <= number < LARGEST_COUNT for number in numbers(value))
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{', '.join(map(repr, self._words))} or whole numbers, such as '0,3,7'"


def numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers in a text, such as '0,3,7' or '[0, 3, 7]'. Raises ValueError if it is anything else."""
    return tuple(int(number) for number in text.strip('[]() ').split(','))


class Interval:
    """Two numbers from 0 on, the lower first, or none."""

    def accepts(self, value: Any) -> bool:
        real = all(isinstance(end, (int, float)) and math.isfinite(end) for end in value)
        return real and len(value) in (0, 2) and (not value or 0 <= value[0] < value[1])

    def __str__(self) -> str:
        return 'two numbers from 0 on, the lower first, such as (0.3,3), or ()'


class Each:
    """Any number of values, each within a limit."""

    def __init__(self, limit: Limit):
        self._limit = limit

    def accepts(self, value: Any) -> bool:
        return isinstance(value, (tuple, list)) and all(map(self._limit.accepts, value))

    def __str__(self) -> str:
        return f'a tuple, each value {self._limit}'


class Sizes:
    """A few positive whole numbers."""

    def accepts(self, value: Any) -> bool:
        return len(value) <= 16 and all(isinstance(number, int) and 0 < number < 2**16 for number in value)

    def __str__(self) -> str:
        return 'at most 16 positive whole numbers'


class SomeOf:
    """Different values, each one of a few, and at least `fewest` of them."""

    def __init__(self, *values: Any, table: str = '', fewest: int = 0):
        self._one, self._fewest = OneOf(*values, table=table), fewest

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, (tuple, list)) or not all(map(self._one.accepts, value)):
            return False
        return len(set(value)) == len(value) >= self._fewest

    def __str__(self) -> str:
        return self._some_of(str(self._one))

    def without_imports(self) -> str:
        """The same as `str`, from the source of the table's module."""
        return self._some_of(self._one.without_imports())

    def _some_of(self, one_of: str) -> str:
        count = f'at least {self._fewest}' if self._fewest else 'some'
        return one_of.replace('one of', f'a tuple of {count} of', 1)


WEIGHTS = OneOf('ema', 'raw')
STEP = Integers(-1)

LIMITS: dict[str, Limit] = {
    'seed': Integers(0),
    'data.image_size': Integers(0, 4096),
    'data.channels': OneOf(0, 1, 3),
    'data.crop': OneOf(table='diffusion.data.pictures:CROPS'),
    'data.max_bad_fraction': Reals(0, 1),
    'data.max_pixels': Integers(1),
    'data.shards': Integers(0),
    'data.placement': OneOf('auto', 'device', 'host'),
    'model.network': OneOf(table='diffusion.networks:NETWORKS'),
    'model.implementation': OneOf('auto', table='diffusion.networks:IMPLEMENTATIONS'),
    'model.kind': OneOf(table='diffusion.gaussian:KINDS'),
    'model.variance': OneOf('fixed', 'learned'),
    'model.channels': Integers(0, 2**16),
    'model.multipliers': Sizes(),
    'model.num_blocks': Integers(1, 64),
    'model.attention_resolutions': Sizes(),
    'model.groups': Integers(1, 2**16),
    'model.patch_size': Integers(1, 4096),
    'model.depth': Integers(1, 256),
    'model.dropout': Reals(0, 1, '[)'),
    'model.num_classes': Integers(0, 10**6),
    'model.first_level': OneOf(0, 1),
    'model.level_scale': Reals(0, ends='()'),
    'model.num_heads': Integers(0, 2**16),
    'model.head_channels': Integers(0, 2**16),
    'model.norm_epsilon': Reals(0, 1, '()'),
    'model.downsample_padding': OneOf(0, 1),
    'model.updown_levels': OneOf('all', 'attention'),
    'model.embedding_order': OneOf('sin_cos', 'cos_sin'),
    'model.embedding_shift': OneOf(0, 1),
    'model.dtype': OneOf('float32', 'bfloat16'),
    'schedule.name': OneOf(table='diffusion.schedule:SCHEDULES'),
    'schedule.T': Integers(1, 100_000, ': float32 has few numbers between more levels, where the ODE goes'),
    'schedule.beta_start': Reals(0, 1),
    'schedule.beta_end': Reals(0, 1),
    'schedule.offset': Reals(0, 1),
    'schedule.max_beta': Reals(0, 1, '(]'),
    'train.loss': OneOf(table='diffusion.loss:WEIGHTINGS'),
    'train.batch_size': Integers(1),
    'train.label_dropout': Reals(0, 1, '[)'),
    'train.accumulate': Integers(1),
    'train.num_steps': Integers(1),
    'train.learning_rate': Reals(0, ends='()'),
    'train.warmup_steps': Integers(0),
    'train.grad_clip': Reals(0, ends='[)'),
    'train.ema_decay': Reals(0, 1, '[)'),
    'train.max_bad_steps': Integers(1),
    'train.checkpoint_every': Integers(1),
    'train.keep_checkpoints': Integers(1),
    'train.log_every': Integers(1),
    'train.sample_every': Integers(0),
    'sample.num_images': Integers(1),
    'sample.num_steps': Integers(1),
    'sample.eta': Reals(0, 1),
    'sample.rule': OneOf(table='diffusion.sampler:RULES'),
    'sample.spacing': OneOf(table='diffusion.schedule:SPACINGS'),
    'sample.variance': OneOf('auto', table='diffusion.gaussian:VARIANCES'),
    'sample.labels': NumbersOr('all', 'none'),
    'sample.guidance': Reals(0, ends='[)'),
    'sample.guidance_interval': Interval(),
    'sample.guide_step': STEP,
    'sample.weights': WEIGHTS,
    'sample.step': STEP,
    'sample.batch_size': Integers(1),
    'sample.seed': Integers(0),
    'sample.compat': OneOf(table='diffusion.compat:COMPAT'),
    'sample.metrics': SomeOf(table='diffusion.metrics.tables:METRICS'),
    'metrics.dialects': SomeOf(table='diffusion.metrics.resize:DIALECTS'),
    'sweep.num_steps': Each(Integers(1)),
    'sweep.etas': Each(Reals(0, 1)),
    'sweep.num_images': Integers(0),
    'metrics.batch_size': Integers(1),
    'likelihood.quantities': SomeOf('importance', 'flow', table='diffusion.likelihood.elbo:FORMS', fewest=1),
    'likelihood.num_images': Integers(0),
    'likelihood.samples': Integers(1),
    'likelihood.num_steps': Integers(0),
    'likelihood.levels': Integers(0),
    'likelihood.eta': Reals(0, 1),
    'likelihood.variance': OneOf('auto', table='diffusion.gaussian:VARIANCES'),
    'likelihood.rtol': Reals(0, 1, '()'),
    'likelihood.atol': Reals(0, 1, '()'),
    'likelihood.probes': Integers(-1, 2**16),
    'likelihood.weights': WEIGHTS,
    'likelihood.step': STEP,
    'likelihood.batch_size': Integers(1),
    'likelihood.seed': Integers(0),
    'plan.programs': SomeOf('train', 'sample', 'likelihood'),
    'interop.format': OneOf('diffusers', 'arrays'),
    'interop.attention_order': OneOf('', 'legacy', 'new'),
    'interop.weights': WEIGHTS,
    'interop.step': STEP,
    'mesh.fsdp': Integers(1),
    'distributed.num_processes': Integers(0),
    'distributed.process_id': Integers(-1),
    'distributed.timeout': Integers(1),
    'compile_cache': FolderOr('', 'off'),
}


def check(config: Mapping[str, Any]) -> None:
    """Check the value of every key that has a limit. Combinations of keys are checked where they are used.

    Args:
        config: the config, a mapping of mappings.

    Raises:
        ValueError: a key has a value that it may not have; the message names the key.
    """
    for key, limit in LIMITS.items():
        value = functools.reduce(lambda part, name: part[name], key.split('.'), config)
        if not limit.accepts(value):
            raise ValueError(f'config.{key} is {value!r}, but must be {limit}')
