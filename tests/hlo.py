"""Reads the operations of a compiled program from its HLO text."""

import math
import re

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')


def collectives(text):
    """[kind, [elements of each array that it returns], whether it is in a loop] for each collective of a program."""
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
    """The convolutions and matrix products of a program for CPUs that are not YNNPACK's, above `largest` elements."""
    of_ynnpack = set(re.findall(r' calls=%?([\w.\-]+),.*__ynn_fusion', text))
    found, computation = [], ''
    for line in text.splitlines():
        computation = _header(line) or computation
        made = re.search(r' = [a-z]+\d+\[([\d,]*)\]\S* (?:convolution|dot)\(', line)
        if made and computation not in of_ynnpack and math.prod(int(n) for n in made[1].split(',') if n) > largest:
            found.append(line.strip())
    return found


def _header(line):
    """The name of the computation that starts at this line, or ''."""
    header = re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    return header[1] if header else ''


def talks_to_host(text):
    """Whether the program calls Python, sends or receives while it runs."""
    return bool(re.search(r'callback|\b(?:infeed|outfeed|send|recv)\(', text))
