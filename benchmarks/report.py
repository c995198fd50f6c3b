"""Write the tables and plots of README.md from the figures in results/.

python -m benchmarks.report
"""

import glob
import json
import os

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.features import DISTANCE, OVER_PYTORCH_FID
from benchmarks.peers import TASKS, ratios
from benchmarks.record import RESULTS

PAGE = os.path.join(os.path.dirname(RESULTS), 'README.md')
BEGIN, END = '<!-- written by python -m benchmarks.report -->\n', '<!-- end -->\n'
TITLES = {'peers': 'Two CPU cores, float32', 'gpu': 'One GPU, bfloat16'}
MISSING = 'not measured'


def load(folder: str = RESULTS) -> dict[str, dict]:
    """Return {machine: {benchmark: figures}} of all results in a folder."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, '*.json'))):
        with open(path, encoding='utf-8') as file:
            found[os.path.basename(path).removesuffix('.json')] = json.load(file)
    return found


def found_by(results: dict[str, dict], benchmark: str) -> tuple[str, dict]:
    """Return (machine, figures) of the first machine on which a benchmark ran, or ('', {})."""
    return next(((machine, found[benchmark]) for machine, found in results.items() if benchmark in found), ('', {}))


def table(benchmark: str, measured: dict) -> str:
    """Return the table that compares our side with PyTorch, with a row for each task and peer."""
    rows = ['| task | seconds | PyTorch | time, ours/theirs | target | memory, ours/theirs |']
    rows += ['|---|---:|---|---:|---:|---:|']
    for task in TASKS[benchmark]:
        for side, target in task.targets.items():
            found = measured.get(task.name)
            if found is None or side not in found['seconds']:
                seconds = f'{np.median(found["seconds"]["ours"]):.3g}' if found else MISSING
                rows.append(f'| {task.name} | {seconds} | {side} | {MISSING} | ≤ {target} | {MISSING} |')
                continue
            of_side = ratios(found, side)
            memory = found['megabytes']['ours'] / found['megabytes'][side]
            rows.append(
                f'| {task.name} | {np.median(found["seconds"]["ours"]):.3g} | {side} | {np.median(of_side):.2f} '
                f'({of_side.min():.2f} … {of_side.max():.2f}) | ≤ {target} | {memory:.2f} |'
            )
    return '\n'.join(rows) + '\n'


def others(results: dict[str, dict]) -> str:
    """Return the table of the other figures that have a target."""
    _, cost = found_by(results, 'cost')
    gpu = found_by(results, 'gpu')[1].get('rates', {})
    rows = ['| figure | measured | target |', '|---|---:|---:|']

    def row(what, value, target, digits='.2f'):
        rows.append(f'| {what} | {MISSING if value is None else format(value, digits)} | {target} |')

    first, compiling = 'seconds to the first step, compiled before, median', 'sampler compile time, 1000 steps over 10'
    row('digits, command to first step with a warm compile cache, s', cost.get(first), '≤ 10', '.1f')
    row('sampler, compile time for 1000 steps over that for 10', cost.get(compiling), '≤ 1.2')
    bound = 'ELBO over network evaluations alone, median of the batches'
    row('ELBO of digits, time over that of the network evaluations alone, CPU', cost.get(bound), '≤ 1.2')
    row(
        'ELBO, time over that of the network evaluations alone, GPU',
        gpu.get('ELBO over network evaluations alone'),
        '≤ 1.2',
    )
    features = found_by(results, 'features')[1]
    row('Fréchet distance of 2,048 values, s', features.get(DISTANCE), '≤ 10', '.1f')
    row("Inception's features of pictures, time over pytorch-fid's, CPU", features.get(OVER_PYTORCH_FID), '≤ 1.0')
    for task in TASKS['gpu']:
        if task.num_steps:
            what = f'{task.name}: network evaluations per second'
            row(what, gpu.get(what), '≥ 30,000', ',.0f')
        else:
            what = f'{task.name}: share of the rate of matrix products'
            row(what, gpu.get(what), '≥ 0.4')
    return '\n'.join(rows) + '\n'


def plot(path: str, benchmark: str, measured: dict) -> None:
    """Plot the ratio of each repetition, their median and the target, with a line for each task and peer."""
    lines = [
        (task.name, side, target, ratios(measured[task.name], side))
        for task in TASKS[benchmark]
        for side, target in task.targets.items()
        if side in measured.get(task.name, {}).get('seconds', {})
    ]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.55 * len(lines)), layout='constrained')
    axes.axvline(1, color='0.6', linewidth=1)
    for y, (_, _, target, of_side) in enumerate(reversed(lines)):
        axes.plot(
            of_side, [y] * len(of_side), 'o', color='tab:blue', alpha=0.4, label='each repetition' if y == 0 else None
        )
        axes.plot(np.median(of_side), y, '|', color='tab:blue', ms=22, mew=3, label='median' if y == 0 else None)
        axes.plot(target, y, 'D', color='tab:green', ms=7, mfc='none', label='target' if y == 0 else None)
    axes.set_yticks(range(len(lines)), [f'{name}\nPyTorch, {side}' for name, side, _, _ in reversed(lines)], fontsize=8)
    axes.set_xlim(0, None)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel('time, ours/PyTorch’s (left is faster)')
    axes.legend(loc='lower left', fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compared(measured: dict) -> bool:
    """Return whether PyTorch's side was measured, too."""
    return any(len(found['seconds']) > 1 for found in measured.values())


def page(results: dict[str, dict]) -> str:
    """Return the part of README.md that shows the figures."""
    parts = []
    for benchmark, title in TITLES.items():
        machine, found = found_by(results, benchmark)
        versions = ', '.join(f'{name} {version}' for name, version in found.get('versions', {}).items())
        about = f'Command: `python -m benchmarks.{benchmark}`' + f'. Machine: {machine}, {versions}' * bool(machine)
        measured = found.get('tasks', {})
        parts.append(f'### {title}\n\n{about}.\n\n{table(benchmark, measured)}')
        if compared(measured):
            parts.append(f'![ratio of each repetition, median and target](results/{machine}.png)\n')
    return '\n'.join([*parts, '### Other figures\n', others(results)])


def main() -> None:
    """Write the plots and README.md."""
    results = load()
    for benchmark in TITLES:
        machine, found = found_by(results, benchmark)
        if compared(found.get('tasks', {})):
            plot(os.path.join(RESULTS, f'{machine}.png'), benchmark, found['tasks'])
    with open(PAGE, encoding='utf-8') as file:
        before, rest = file.read().split(BEGIN)
    with open(PAGE, 'w', encoding='utf-8') as file:
        file.write(before + BEGIN + page(results) + END + rest.split(END)[1])


if __name__ == '__main__':
    main()
