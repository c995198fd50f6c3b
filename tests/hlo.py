"""What a compiled program does between devices, read from its HLO."""

import math
import re

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')


def collectives(text):
    """[kind, [elements of each array that comes out of it], executed in a loop], for each in a program's text."""
    bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
    found, computation = [], ''
    for line in text.splitlines():
        computation = _header(line) or computation
        made = re.search(rf' = (.*?) ({"|".join(COLLECTIVES)})(?:-start)?\(', line)
        if made:
            shapes = re.findall(r'[a-z]+\d+\[([\d,]*)\]', made[1])
            sizes = [math.prod(int(n) for n in shape.split(',') if n) for shape in shapes]
            found.append([made[2], sizes, computation in bodies])
    return found


def left_to_eigen(text, largest=1000):
    """The convolutions and matrix products of a program for CPUs with more than `largest` results, but YNNPACK's."""
    of_ynnpack = set(re.findall(r' calls=%?([\w.\-]+),.*__ynn_fusion', text))
    found, computation = [], ''
    for line in text.splitlines():
        computation = _header(line) or computation
        made = re.search(r' = [a-z]+\d+\[([\d,]*)\]\S* (?:convolution|dot)\(', line)
        if made and computation not in of_ynnpack and math.prod(int(n) for n in made[1].split(',') if n) > largest:
            found.append(line.strip())
    return found


def _header(line):
    """The name of the computation that begins here, or ''."""
    header = re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    return header[1] if header else ''


def talks_to_host(text):
    """Whether the program calls Python, or sends and receives, while it runs."""
    return bool(re.search(r'callback|\b(?:infeed|outfeed|send|recv)\(', text))
