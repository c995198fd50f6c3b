"""What a compiled program consists of, read from its text: kernels, loops, and messages between devices."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Operations without a kernel of their own. The second half of an asynchronous operation belongs to the first.
FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'partition-id', 'replica-id'}
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
BYTES |= {'s64': 8, 'u64': 8, 'f64': 8}
CALLED = r'(?:to_apply|body|branch_computations|calls|true_computation|false_computation)=(\{[^}]*\}|[^\s,]+)'


class Operation(NamedTuple):
    """An operation that takes time on the device."""

    name: str  # such as 'fusion', 'custom-call', 'all-reduce'
    nbytes: int  # of its results
    in_loop: bool  # whether it is within a loop


def operations(text: str) -> list[Operation]:
    """Return the operations of a compiled program, each once, in the order of its text.

    Args:
        text: what `jax.stages.Compiled.as_text` returns.
    """
    computations, entry = _computations(text)
    return list(_walk(computations, entry, False))


def collectives(found: list[Operation]) -> dict[str, dict[str, int]]:
    """Return {kind: {'count', 'bytes': of the results on each device}} of the messages between devices."""
    kinds = {kind: [op.nbytes for op in found if op.name == kind] for kind in COLLECTIVES}
    return {kind: {'count': len(sizes), 'bytes': sum(sizes)} for kind, sizes in kinds.items() if sizes}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return ({name: lines}, the name of the one that is run)."""
    found: dict[str, list[str]] = {}
    entry = name = ''
    for line in text.splitlines():
        header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            found[name] = []
        elif name and ' = ' in line:
            found[name].append(line)
    return found, entry


def _walk(computations: dict[str, list[str]], name: str, in_loop: bool) -> Iterator[Operation]:
    for line in computations.get(name, ()):
        made = re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(', line)
        if not made:
            continue
        shapes, kind = made.groups()
        inner = [called for found in re.findall(CALLED, line) for called in re.findall(r'[\w.\-]+', found)]
        if kind in ('call', 'while', 'conditional'):
            for called in inner:
                yield from _walk(computations, called, in_loop or kind == 'while')
        elif kind == 'async-start':  # it calls a computation that holds the operation
            yield from _walk(computations, inner[0], in_loop)
        elif kind not in FREE and not kind.endswith(('-done', '-update')):
            if kind.endswith('-start') and kind != 'all-reduce-start':  # it returns (operands, results, …)
                shapes = [*_elements(shapes), shapes][1]
            yield Operation(kind.removesuffix('-start'), sum(_sizes(shapes)), in_loop)


def _elements(shapes: str) -> list[str]:
    """Return the types that a tuple consists of."""
    found, depth = [''], 0
    for letter in shapes[1:-1]:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and not depth:
            found.append('')
        else:
            found[-1] += letter
    return found


def _sizes(shapes: str) -> list[int]:
    """Return the bytes of each array of a type."""
    found = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
    return [BYTES.get(kind, 0) * math.prod(int(n) for n in shape.split(',') if n) for kind, shape in found]
