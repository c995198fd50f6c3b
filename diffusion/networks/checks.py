"""Checks of the sizes of U-Nets, before their layers are made."""

from collections.abc import Sequence


def check_sizes(
    image_size: int,
    channels: int,
    multipliers: Sequence[int],
    num_blocks: int,
    attention_resolutions: Sequence[int],
    dropout: float,
    groups: int,
) -> None:
    """Raise ValueError if sizes do not fit together."""
    if not multipliers or not all(isinstance(m, int) and m > 0 for m in multipliers):
        raise ValueError(f'multipliers is {multipliers}, but must be positive integers, one per resolution')
    if num_blocks < 1 or groups < 1:
        raise ValueError(f'num_blocks is {num_blocks} and groups is {groups}, but both must be at least 1')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout is {dropout}, but must lie in [0, 1)')
    unit = 2 ** (len(multipliers) - 1)
    if image_size < unit or image_size % unit:
        below = image_size // unit * unit
        possible = f'{below} or {below + unit}' if below else f'{unit}'
        raise ValueError(
            f'image_size is {image_size}, which cannot be halved {len(multipliers) - 1} times, as '
            f'{len(multipliers)} multipliers need; {possible} would do, or fewer multipliers'
        )
    if channels < 4 or channels % 2:
        raise ValueError(f'channels is {channels}, but the time embedding needs an even number of at least 4')
    for m in multipliers:
        if channels * m % groups:
            raise ValueError(f'channels × multiplier = {channels * m} is not divisible by groups = {groups}')
    sizes = [image_size >> level for level in range(len(multipliers))]
    absent = [size for size in attention_resolutions if size not in sizes]
    if absent:
        raise ValueError(f'attention_resolutions has {absent}, but the sizes of this network are {sizes}')


def check_heads(
    image_size: int,
    channels: int,
    multipliers: Sequence[int],
    attention_resolutions: Sequence[int],
    mid_attention: bool,
    parts: dict[str, int],
) -> None:
    """Raise ValueError if a width that has attention is not divisible by one of the named `parts`, unless that is 0."""
    attended = {m for level, m in enumerate(multipliers) if image_size >> level in attention_resolutions}
    for m in sorted(attended | ({multipliers[-1]} if mid_attention else set())):
        for name, part in parts.items():
            if part and channels * m % part:
                raise ValueError(f'channels × multiplier = {channels * m} is not divisible by {name} = {part}')
