"""--mode=sweep: images and metrics for several numbers of steps and η, from one checkpoint, as in DDIM's Table 1."""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import build, sampler, workdir
from diffusion.build import Experiment
from diffusion.conditions import Conditions, open_conditions, require_conditions
from diffusion.modes import evaluate
from diffusion.modes.sample import Drawn, draw_all, make_draw, settings_sha256
from diffusion.report.grid import save_grid
from diffusion.report.sweep import save_sweep
from diffusion.runtime import hosts
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from diffusion.schedule import timesteps
from diffusion.util import RunError, json_sha256, naming, read_json, replacing, say, versions, write_json, write_text

SHOWN = 4  # images of each cell on the contact sheet


class Cell(NamedTuple):
    """A way to sample.

    Attributes:
        eta: η.
        variance: 'small' is the η family, 'large' DDPM's σ² = β, the DDIM paper's σ̂, 'learned' that of the network.
        num_steps: network evaluations per image.
    """

    eta: float
    variance: str
    num_steps: int

    @property
    def row(self) -> str:
        """Its row in the paper's table."""
        return {'large': 'σ̂', 'learned': 'Σ_θ'}.get(self.variance, f'η = {self.eta:g}')


def run(config: ConfigDict, path: str) -> int:
    """Draw and measure images in each cell, and write sweep/<name>/; resume where an earlier call stopped.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        0 if everything is computed, EXIT_STATUS if a signal stopped it (finished cells are kept).

    Raises:
        RunError: the config does not allow it, there is no checkpoint, or the folder cannot be written.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    exp = build.build(config)
    cells = all_cells(config)
    check_cells(config, exp, cells)
    require_conditions(config, path)
    step, params = workdir.load_params(exp.abstract_state(), config, path, config.sample.weights, config.sample.step)
    conditions = open_conditions(config, exp)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    plan = evaluate.prepare(config, shape)
    above = workdir.output_folder(config, path, 'sweep', 'sweep')
    workdir.use_compile_cache(config)
    params_sha256 = workdir.digest(params)
    trained_on = (workdir.read_config(path) or {}).get('images')
    config.sample.num_images = config.sweep.num_images or config.sample.num_images
    if config.metrics.memorization:
        say('metrics.memorization: a sweep does not look for copies of training images, but --mode=sample does')
        config.metrics.memorization = False
    settings = {
        'checkpoint_step': step,
        'params_sha256': params_sha256,
        'sample': {key: config.sample[key] for key in ('weights', 'rule', 'spacing', 'clip', 'seed', 'num_images')},
        **evaluate.settings(config, plan),
        'model': config.model.to_dict(),
        'schedule': config.schedule.to_dict(),
        **({'conditions': conditions.settings} if conditions.settings else {}),
        'versions': versions(),
    }
    digest = json_sha256(settings)[:8]
    name = f'step{step}-{config.sample.weights}-n{config.sample.num_images}-seed{config.sample.seed}-{digest}'
    folder = os.path.join(above, name)

    longest = max(cell.num_steps for cell in cells)

    # Compute.
    @functools.lru_cache(maxsize=1)  # cells come row by row
    def draw_row(eta: float, variance: str) -> Callable:
        return make_row_sampler(config, exp, conditions, params, shape, Cell(eta, variance, longest))

    results = []
    with Interrupt('batch') as interrupt:
        for number, cell in enumerate(cells):
            say(f'{cell.row}, {cell.num_steps} steps ({number + 1} of {len(cells)})')
            found = compute(
                config, exp, plan, params, conditions, cell, draw_row, folder, params_sha256, trained_on, interrupt
            )
            if found is None:
                reason = interrupt or 'a signal to another host'
                say(f'{reason}: {number} of {len(cells)} cells are done and kept; the same command resumes')
                return EXIT_STATUS
            results.append(found)
    if not hosts.is_first():
        return 0

    # Record and report.
    rows = [
        cell._asdict()
        | {'rule': config.sample.rule, 'metric': entry['name']}
        | {key: entry[key] for key in ('features', 'dialect', 'value', 'standard_error', 'n')}
        for cell, found in zip(cells, results, strict=True)
        for entry in found['metrics']
    ]
    require_one_reference(results, folder)
    table = markdown(rows)
    with workdir.writing(folder, key='sweep.folder'):
        reference = {evaluate.in_full(entry['name'], entry): entry.get('reference') for entry in results[0]['metrics']}
        left_out = results[0]['left_out']
        record = {'cells': rows, 'reference': reference, 'left_out': left_out, 'settings': settings}
        write_json(os.path.join(folder, 'sweep.json'), record)
        write_text(os.path.join(folder, 'sweep.md'), table)
        save_sweep(os.path.join(folder, 'sweep.png'), curves(rows))
        images = np.concatenate([np.load(cell_path(folder, cell, 'npy')) for cell in cells])
        columns = len(images) // len({cell.row for cell in cells})
        save_grid(os.path.join(folder, 'contact.png'), images, most=len(images), columns=columns)
    say(f'\n{table}')
    evaluate.tell({'metrics': [], 'left_out': left_out, 'memorization': []})
    for written in ('sweep.json', 'sweep.md', 'sweep.png', 'contact.png'):
        say(os.path.join(folder, written))
    return 0


def all_cells(config: ConfigDict) -> list[Cell]:
    """Return the cells that config.sweep asks for, row by row."""
    rows = [(float(eta), 'small') for eta in config.sweep.etas] + [(1.0, 'large')] * config.sweep.large
    rows += [(1.0, 'learned')] * (config.model.variance == 'learned')
    return [Cell(*row, num_steps) for row, num_steps in itertools.product(rows, config.sweep.num_steps)]


def check_cells(config: ConfigDict, exp: Experiment, cells: list[Cell]) -> None:
    """Raise RunError if there is no cell, or one that cannot be sampled, before anything is computed."""
    if not cells:
        raise RunError('config.sweep asks for nothing: name some num_steps, and some etas or large=True')
    if config.sample.compat:
        raise RunError(f'config.sample.compat is {config.sample.compat!r}, but a sweep sets steps and η itself')
    for cell in cells:
        with naming(f'config.sweep ({cell.row}, {cell.num_steps} steps), config.sample.spacing'):
            make_steps(config, exp, cell)


def require_one_reference(results: list[dict[str, Any]], folder: str) -> None:
    """Raise RunError if cells were compared with different images, because the data changed between two commands."""
    references: dict[tuple[str, str], Any] = {}
    for entry in itertools.chain.from_iterable(found['metrics'] for found in results):
        reference = entry.get('reference')
        if references.setdefault((entry['name'], entry['dialect']), reference) != reference:
            raise RunError(
                f'the cells in {folder} were compared with different images, because those of config.data have '
                'changed: remove that folder, and type the same command'
            )


def make_steps(config: ConfigDict, exp: Experiment, cell: Cell) -> sampler.Steps:
    """Return the steps of a cell."""
    levels = timesteps(exp.schedule.T, cell.num_steps, config.sample.spacing)
    return sampler.make_steps(exp.schedule, levels, kind=config.model.kind, eta=cell.eta, variance=cell.variance)


def cell_path(folder: str, cell: Cell, ending: str) -> str:
    """Return a file of a cell."""
    return os.path.join(folder, 'cells', f'eta{cell.eta:.12g}-{cell.variance}-{cell.num_steps}.{ending}')


def compute(
    config: ConfigDict,
    exp: Experiment,
    plan: evaluate.Plan,
    params: Any,
    conditions: Conditions,
    cell: Cell,
    draw_row: Callable,
    folder: str,
    params_sha256: str,
    trained_on: dict[str, Any] | None,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Draw and measure the images of one cell, or read what was found before; None if a signal came.

    A cell that had no reference is computed again, because there may be one now.
    """
    result = cell_path(folder, cell, 'json')
    known = read_json(result) if hosts.is_first() and os.path.exists(result) else None
    if hosts.from_first(np.array(known is not None and not known.get('no_reference'))):
        return known or {}
    asked = config.sample
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    chain = {
        'timesteps': timesteps(exp.schedule.T, cell.num_steps, asked.spacing),
        'eta': cell.eta,
        'variance': cell.variance,
        'clip': asked.clip,
    }
    batch_size = min(asked.batch_size, asked.num_images)
    with naming('config.sweep'):
        draw = functools.partial(draw_row(cell.eta, cell.variance), steps=make_steps(config, exp, cell))
        params = conditions.params(params)
    with workdir.writing(folder, key='sweep.folder'):
        done = {key: value for key, value in chain.items() if key != 'timesteps'}
        drawn = Drawn(
            os.path.dirname(result), shape, settings_sha256(config, params_sha256, done, chain, conditions.settings)
        )
        count = draw_all(draw, params, asked, batch_size, drawn, exp.mesh, interrupt)
    if count < asked.num_images:
        return None
    images = drawn.images() if hosts.is_first() else None
    found = evaluate.measure(config, plan, images, count, exp.mesh, trained_on, folder)
    if images is not None:
        with workdir.writing(folder, key='sweep.folder'):
            with replacing(cell_path(folder, cell, 'npy')) as file:
                np.save(file, images[:SHOWN])
            write_json(result, {key: value for key, value in found.items() if key != 'influences'})
            drawn.remove()
    return found


def make_row_sampler(
    config: ConfigDict,
    exp: Experiment,
    conditions: Conditions,
    params: Any,
    shape: tuple[int, ...],
    longest: Cell,
) -> Callable:
    """Compile a function that draws the images of all cells of a row.

    Every cell starts from the noise of level T, also with a spacing whose first level depends on the number of steps.

    Args:
        config: config.sample says how.
        exp: schedule, network, mesh and implementation.
        conditions: the classes of the images, and guidance.
        params: parameters.
        shape: of one image, (H, W, C).
        longest: the cell of the row with the most steps.

    Returns:
        The function (params, seed, start, stop, *, steps) → images start … stop−1, (stop−start, H, W, C) float32.
    """

    def sample(keys, net, steps, num_steps):
        x_T = sampler.noise(keys, exp.schedule.T, shape)
        net = exp.network.for_variance(net, longest.variance)
        how = dict(kind=config.model.kind, eta=longest.eta, clip=config.sample.clip, rule=config.sample.rule)
        return sampler.follow(keys, exp.schedule, net, steps, num_steps, x_T=x_T, **how)

    def padded(steps):
        missing = longest.num_steps - len(steps.t)
        return jax.tree.map(lambda values: np.pad(values, (0, missing)), steps), len(steps.t)

    batch_size = min(config.sample.batch_size, config.sample.num_images)
    how = dict(batch_size=batch_size, net_of=conditions.net_of)
    draw = make_draw(exp, conditions.params(params), sample, *padded(make_steps(config, exp, longest)), **how)
    return lambda *images, steps: draw(*images, *padded(steps))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return one table for each metric: η by the number of steps, as in the DDIM paper's Table 1."""
    text = ''
    for metric, named in curves(rows).items():
        columns = dict.fromkeys(steps for points in named.values() for steps, _, _ in points)
        text += f'{metric} of {rows[0]["n"]} images\n\n'
        text += '| | ' + ' | '.join(f'{count} steps' for count in columns) + ' |\n'
        text += '|---' * (1 + len(columns)) + '|\n'
        for name, points in named.items():
            cells = {steps: f'{value:.4g} ± {error:.2g}' for steps, value, error in points}
            text += f'| {name} | ' + ' | '.join(cells.get(count, '') for count in columns) + ' |\n'
        text += '\n'
    return text


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """Return {metric (features, dialect): {row of the table: [(steps, value, standard error)]}}."""
    result: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for row in rows:
        name = Cell(row['eta'], row['variance'], row['num_steps']).row
        point = row['num_steps'], row['value'], row['standard_error']
        result.setdefault(evaluate.in_full(row['metric'], row), {}).setdefault(name, []).append(point)
    return result
