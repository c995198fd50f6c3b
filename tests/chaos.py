"""Kill a training run at random moments, fill its disk and damage its checkpoints; check that nothing is lost.

    python -m tests.chaos [--kills=15] [--corruptions=40] [--seed=0] [--write]

A tiny network learns the digits once without interruption. Then the same command is killed at random moments, also
during saves, by SIGKILL and by signals that stop a run, and repeated until it is done: its checkpoint and the logged
numbers must be those of the uninterrupted run, bit by bit. Sampling is stopped by signals at random moments: it must
end with status 75. Files of the checkpoints are truncated, changed, deleted and swapped: the run must resume from an
intact checkpoint with a warning, or report that there is none, and never use wrong numbers. Its disk is filled (a small
tmpfs, if one can be mounted). A table of faults and outcomes is printed; --write puts it into docs/reliability.md. The
exit status is 1 if anything went wrong.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import build
from diffusion.runtime.checkpoints import Checkpoints, DamagedError
from diffusion.runtime.interrupt import SIGNALS
from tests.runs import ROOT, checkpoint

STEPS = 400
SETTINGS = {
    'model.channels': 8,
    'model.groups': 4,
    'model.attention_resolutions': '()',
    'train.batch_size': 16,
    'train.num_steps': STEPS,
    'train.checkpoint_every': 10,
    'train.log_every': 1,
    'train.sample_every': 100,
}
MARK = '<!-- the table below is written by python -m tests.chaos --write -->'


def command(workdir, *more, **changes):
    """The command line of the run; runs share their compiled programs, because compiling takes most of the time."""
    settings = SETTINGS | {'compile_cache': workdir.parent / 'compiled'} | changes
    flags = [f'--config.{key}={value}' for key, value in settings.items()]
    return [sys.executable, 'main.py', '--config=configs/digits.py', f'--workdir={workdir}', *flags, *more]


def start(workdir, *more, **changes):
    return subprocess.Popen(
        command(workdir, *more, **changes), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    """(exit status, output) once it has ended."""
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def same(one, other):
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def logged(workdir):
    """The lines of metrics.jsonl, but for the time that steps took."""
    lines = (workdir / 'logs' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ('images_per_second', 'colour_drift')} for line in lines
    ]


class Table:
    """Counts of faults and outcomes; `bad` lists outcomes that must not happen."""

    def __init__(self):
        self.counts, self.bad = collections.Counter(), []

    def add(self, fault, outcome, ok=True, detail=''):
        self.counts[fault, outcome] += 1
        if not ok:
            self.bad.append(f'{fault}: {outcome}\n{detail}')

    def markdown(self):
        rows = [f'| {fault} | {outcome} | {count} |' for (fault, outcome), count in sorted(self.counts.items())]
        return '\n'.join(['| fault | outcome | times |', '|---|---|---:|', *rows]) + '\n'


def kills(table, folder, reference, number, rng):
    """Kill runs until `number` kills are done; compare each run that reaches its end."""
    seconds, killed = 5.0, 0
    while killed < number:
        workdir = folder / f'run{killed}'
        begun = time.monotonic()
        while True:
            before = unfinished(workdir)
            process = start(workdir)
            what = rng.choice([*3 * [signal.SIGKILL], *SIGNALS])
            if killed < number:
                wait_to_kill(process, workdir, rng.uniform(0, 1.2 * seconds), rng.random() < 0.3)
                inside = bool(unfinished(workdir) - before)
                process.send_signal(what)
            status, output = finish(process)
            if status == 0:
                break
            killed += 1
            fault = f'{what.name}, {"inside a save" if inside else "between saves"}'
            if what == signal.SIGKILL:
                table.add(fault, 'ended at once', status == -what, output)
            else:
                table.add(fault, *outcome(what, status, output))
        seconds = min(seconds, time.monotonic() - begun)
        table.add(
            'a run killed again and again until it is done',
            'parameters, EMA and optimizer bit by bit those of the uninterrupted run',
        ) if same(checkpoint(workdir, STEPS), checkpoint(reference, STEPS)) else table.add(
            'killed run', 'OTHER NUMBERS', False, str(workdir)
        )
        right = logged(workdir) == logged(reference)
        table.add('its log', 'each step once, with the same numbers' if right else 'ANOTHER LOG', right, str(workdir))
        shutil.rmtree(workdir)


def outcome(what, status, output):
    """(outcome, whether it is right, details) of a process that was asked to stop."""
    if status == -what and ('record.json' in output or 'complete: ' in output):  # Python was ending
        return 'it was complete', True, output
    if not output or 'Fatal Python error: init' in output:  # Python was starting, and nothing of ours listens yet
        return 'ended at once', status in (-what, 1, 75), f'{status} {output}'
    if 'interrupted:' in output:
        return 'there was nothing to save: ended at once, exit status 75', status == 75, f'{status} {output}'
    return 'saved, exit status 75', status == 75 and 'Traceback' not in output, f'{status} {output}'


def stops(table, reference, number, rng):
    """Ask sampling to stop at random moments: while it imports, reads, compiles, draws, measures and writes."""
    sample = {'sample.num_images': 512, 'sample.num_steps': 100, 'compile_cache': 'off'}
    begun = time.monotonic()
    finish(start(reference, '--mode=sample', **sample))
    seconds = time.monotonic() - begun
    for _ in range(number):
        process = start(reference, '--mode=sample', **sample)
        what = rng.choice(SIGNALS)
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(what)
        status, output = finish(process)
        if status == 0:
            table.add(f'{what.name} while sampling', 'it was complete', 'record.json' in output, output)
        else:
            table.add(f'{what.name} while sampling', *outcome(what, status, output))


def unfinished(workdir):
    """(name, inode) of the checkpoints that are being written, or were when their process died."""
    found = set()
    for path in (workdir / 'checkpoints').glob('*tmp*'):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def wait_to_kill(process, workdir, seconds, in_save):
    """Wait for some seconds, or until a checkpoint is being written."""
    before, deadline = unfinished(workdir), time.monotonic() + (60 if in_save else seconds)
    while time.monotonic() < deadline and process.poll() is None:
        if in_save and unfinished(workdir) - before:
            return
        time.sleep(0 if in_save else 0.01)


def corruptions(table, folder, reference, number, rng):
    """Damage one file of the newest checkpoint, and restore the newest that is intact."""
    steps = sorted(int(path.name) for path in (reference / 'checkpoints').iterdir())
    originals = {step: checkpoint(reference, step) for step in steps}
    newest = reference / 'checkpoints' / str(steps[-1])
    files = sorted(path.relative_to(reference) for path in newest.rglob('*') if path.is_file())
    logging.disable(logging.CRITICAL)
    describe = abstract(reference)
    for _ in range(number):
        workdir = folder / 'damaged'
        shutil.copytree(reference, workdir)
        fault = rng.choice(['truncated', 'a bit flipped', 'deleted', 'swapped with another', 'overwritten with zeros'])
        everywhere = rng.random() < 0.15  # in all checkpoints alike
        path = rng.choice(files)
        other = rng.choice(files)
        for step in steps if everywhere else steps[-1:]:
            place = [
                workdir / 'checkpoints' / str(step) / file.relative_to(f'checkpoints/{steps[-1]}')
                for file in (path, other)
            ]
            if all(p.exists() for p in place):
                damage(rng, fault, *place)
        warnings = []
        try:
            with Checkpoints(workdir / 'checkpoints') as checkpoints:
                step, trees = checkpoints.restore_newest(warnings.append, **describe)
        except DamagedError as error:
            named = str(workdir / 'checkpoints') in str(error)
            table.add(
                f'a file of a checkpoint: {fault}', 'no intact one: a clear error', named and everywhere, str(error)
            )
        except Exception as error:
            table.add(f'a file of a checkpoint: {fault}', 'TRACEBACK', False, repr(error))
        else:
            found = {
                part + jax.tree_util.keystr(place): np.asarray(leaf)
                for part, tree in zip(describe, trees, strict=True)
                for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            right = sorted(a.tobytes() for a in found.values()) == sorted(a.tobytes() for a in originals[step].values())
            if step == steps[-1]:
                outcome = 'it holds nothing that is needed: the checkpoint is used, the numbers are right'
            else:
                outcome = 'named in a warning, an older one used, its numbers are right'
                right = right and str(workdir / 'checkpoints' / str(steps[-1])) in ' '.join(warnings)
            table.add(
                f'a file of a checkpoint: {fault}', outcome if right else 'WRONG NUMBERS', right, f'{path} {other}'
            )
        shutil.rmtree(workdir)


def abstract(workdir):
    """Shapes and shardings of the trees of a run, as training restores them."""
    config = ConfigDict(json.loads((workdir / 'config.json').read_text(encoding='utf-8')))
    return build.build(config).abstract_state().trees()


def damage(rng, fault, path, other):
    content = bytearray(path.read_bytes())
    if fault == 'truncated':
        os.truncate(path, rng.randrange(max(1, len(content))))
    elif fault == 'a bit flipped' and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif fault == 'overwritten with zeros' and content:
        at = rng.randrange(len(content))
        content[at : at + 64] = bytes(len(content[at : at + 64]))
        path.write_bytes(content)
    elif fault == 'deleted':
        path.unlink()
    elif fault == 'swapped with another':
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


def full_disk(table, folder, reference):
    """On a disk that has room for two checkpoints: they stay intact, and with more room the run continues."""
    disk = folder / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', disk], capture_output=True).returncode:
        print('no tmpfs can be mounted here: the full disk is left out')
        return
    fault = 'a full disk'
    try:
        workdir = disk / 'run'
        status, output = finish(start(workdir, compile_cache=folder / 'compiled'))
        kept = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
        right = status == 1 and 'could not be saved' in output and 'Traceback' not in output and kept
        table.add(fault, 'warnings, training to the end, an error; earlier checkpoints intact', bool(right), output)
        subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
        status, output = finish(start(workdir, compile_cache=folder / 'compiled'))
        right = (
            status == 0
            and same(checkpoint(workdir, STEPS), checkpoint(reference, STEPS))
            and logged(workdir) == logged(reference)
        )
        table.add(fault, 'with more room: bit by bit the uninterrupted run', right, output)
    finally:
        subprocess.run(['umount', disk], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=15)
    parser.add_argument('--corruptions', type=int, default=40)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--write', action='store_true', help='put the table into docs/reliability.md')
    asked = parser.parse_args()
    table, rng, begun = Table(), random.Random(asked.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        reference = folder / 'reference'
        status, output = finish(start(reference))
        if status:
            sys.exit(f'the uninterrupted run failed:\n{output}')
        corruptions(table, folder, reference, asked.corruptions, rng)
        full_disk(table, folder, reference)
        kills(table, folder, reference, asked.kills, rng)
        stops(table, reference, asked.kills, rng)
    print(table.markdown())
    print(f'{time.monotonic() - begun:.0f} s')
    if asked.write:
        page = ROOT / 'docs' / 'reliability.md'
        text = page.read_text(encoding='utf-8').partition(MARK)[0]
        page.write_text(f'{text}{MARK}\n\n{table.markdown()}', encoding='utf-8')
    if table.bad:
        sys.exit('\n\n'.join(['These must not happen:', *table.bad]))


if __name__ == '__main__':
    main()
