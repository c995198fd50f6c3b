"""What a compiled program does between devices, read from its HLO."""

import math
import re

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')


def collectives(text):
    """[kind, [elements of each array that comes out of it], executed in a loop], for each in a program's text."""
    bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
    found, computation = [], ''
    for line in text.splitlines():
        header = re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if header:
            computation = header[1]
        made = re.search(rf' = (.*?) ({"|".join(COLLECTIVES)})(?:-start)?\(', line)
        if made:
            shapes = re.findall(r'[a-z]+\d+\[([\d,]*)\]', made[1])
            sizes = [math.prod(int(n) for n in shape.split(',') if n) for shape in shapes]
            found.append([made[2], sizes, computation in bodies])
    return found


def talks_to_host(text):
    """Whether the program calls Python, or sends and receives, while it runs."""
    return bool(re.search(r'callback|\b(?:infeed|outfeed|send|recv)\(', text))
