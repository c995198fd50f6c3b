"""--mode=likelihood: every likelihood of the derivation, on real images, side by side."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import build, data, workdir
from diffusion.build import Experiment, Network
from diffusion.likelihood import ledger
from diffusion.likelihood.elbo import FORMS, elbo, strata
from diffusion.likelihood.flow import flow, num_probes
from diffusion.likelihood.importance import log_weight
from diffusion.networks import Program
from diffusion.report.terms import save_terms
from diffusion.runtime import hosts, mesh
from diffusion.runtime.compilation import compiling
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from diffusion.runtime.keys import domain_key
from diffusion.runtime.npz import read_npz
from diffusion.schedule import timesteps
from diffusion.util import (
    RunError,
    json_sha256,
    naming,
    numerics,
    progress,
    replacing,
    say,
    versions,
    write_json,
    write_text,
)

MEMORY = 'lower config.likelihood.batch_size'  # if there is too little
QUANTITIES = (*FORMS, 'importance', 'flow')  # their places determine the random draws


def run(config: ConfigDict, path: str) -> int:
    """Write likelihood/<name>/, part by part, resuming where an earlier call with the same settings stopped.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        0 if everything is computed, EXIT_STATUS if a signal stopped it (finished parts are kept).

    Raises:
        RunError: the config does not allow it, there is no checkpoint, or too few images.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    workdir.check_config(config, path)  # first: what is wrong with the rest may follow from another run's config
    asked = config.likelihood
    asked.variance = choose_variance(config)
    config.model.dtype, config.model.remat = 'float32', False  # as exact as possible; there is no backward pass
    exp = build.build(config)
    with naming('config.likelihood'):
        exp.network.require_variance(asked.variance)
        check_shapes(config, exp)
    step, params = workdir.load_params(exp.abstract_state(), config, path, asked.weights, asked.step)
    above = workdir.output_folder(config, path, 'likelihood', 'likelihood')  # before images are decoded
    workdir.use_compile_cache(config)
    images = build.load_same_images(config, asked.split, 'likelihood.split', config.data.labels)
    require_enough(asked, images)
    settings = {
        'checkpoint_step': step,
        **workdir.settings_for_record(asked),
        'params_sha256': workdir.digest(params),
        'images': {k: images.record[k] for k in ('sha256', 'fingerprint', 'labels_sha256') if k in images.record},
        'numerics': numerics(),
        'versions': versions(),
    }
    pixels = images[: asked.num_images or len(images)]
    if why := one_sided(images, len(pixels)):
        say(f'warning: config.likelihood.num_images={asked.num_images}: {why}')
    labels = np.asarray(images.labels)[: len(pixels)] if config.data.labels else None
    # The name contains a digest of all settings: the same command finds the parts that are computed already.
    digest = json_sha256(settings)[:8]
    name = f'step{step}-{asked.weights}-{asked.split}-n{len(pixels)}-{digest}'
    folder = os.path.join(above, name)
    parts = all_parts(asked, len(pixels))

    # Compute.
    with Interrupt('part') as interrupt:
        done = compute(quantities(config, exp), parts, folder, params, pixels, labels, asked, exp, interrupt)
    if done < len(parts):
        reason = interrupt or 'a signal to another host'
        say(f'{reason}: {done} of {len(parts)} parts are computed and kept; the same command resumes')
        return EXIT_STATUS
    if not hosts.is_first():
        return 0

    # Record and report.
    consistency, record = summarize(parts, folder, config, settings, labels, images.record['classes'])
    record['signal_at_T'] = float(exp.schedule.signal(exp.schedule.T))  # √ᾱ_T
    table = ledger.markdown([ledger.Row(**row) for row in record['rows']])
    if labels is not None:
        classes = {found['name']: [ledger.Row(**row) for row in found['rows']] for found in record['classes']}
        table += f'\nEach image is given its class: log p(x_0 | class).\n\n{ledger.markdown_of_classes(classes)}'
    table += ''.join(f'\n{form.note}\n' for name, form in FORMS.items() if name in asked.quantities and form.note)
    with workdir.writing(folder, key='likelihood.folder'):
        write_json(os.path.join(folder, 'ledger.json'), record)
        write_text(os.path.join(folder, 'ledger.md'), table)
    say(f'{len(pixels)} images of the {asked.split} split of {config.data.source}, each counted once\n\n{table}')
    for quantity, error in record['error_of_the_draws'].items():
        flow = quantity == 'flow'
        source = f'the divergence ({record["solver"]["divergence"]})' if flow else 'levels and noise (an upper bound)'
        say(f'{quantity}: standard error from the draws of {source}: {error:.3f} nats')
    for written in ['ledger.json', 'ledger.md', *plot_terms(folder, consistency, asked, exp)]:
        say(os.path.join(folder, written))
    return 0


def quantities(config: ConfigDict, exp: Experiment) -> dict[str, Callable]:
    """Return the functions that config.likelihood asks for.

    Returns:
        {name: (keys (B,), params, x0 (B, H, W, C), labels (B,) if the network is conditional) → {part: (B, …) nats}}.
    """
    asked, variance = config.likelihood, choose_variance(config)
    common = dict(kind=config.model.kind, variance=variance, clip=asked.clip)
    chain = common | dict(eta=asked.eta, timesteps=chain_levels(asked, exp))
    solver = dict(rtol=asked.rtol, atol=asked.atol, probes=None if asked.probes < 0 else asked.probes)

    def net_of(params, *labels):
        return exp.network.for_variance(exp.network.net(params, *labels), variance)

    def form(keys, params, x0, *labels, form):
        terms = elbo(keys, exp.schedule, net_of(params, *labels), x0, form=form, levels=asked.levels or None, **chain)
        several = terms.consistency.shape[1] > 1  # the error of a single term is not known
        return terms._asdict() | ({'error': terms.standard_error()} if several else {})

    def importance(keys, params, x0, *labels):
        return {'log_weight': log_weight(keys, exp.schedule, net_of(params, *labels), x0, **chain)}

    def ode(keys, params, x0, *labels):
        terms = flow(keys, exp.schedule, net_of(params, *labels), x0, **common, **solver)._asdict()
        error = terms.pop('probe_error')
        return terms if asked.probes == 1 else terms | {'error': error}

    everything = {name: functools.partial(form, form=name) for name in FORMS} | {'importance': importance, 'flow': ode}
    return {name: everything[name] for name in asked.quantities}


def compile_quantity(
    exp: Experiment, function: Callable, key: Any, params: Any, x0: Any, numbers: Any, *labels: Any
) -> Program:
    """Compile (key, params, x0, numbers, *labels) → terms of a batch of images.

    Args:
        exp: mesh and implementation.
        function: one of `quantities`.
        key: typed PRNG key; like the others, or its shape and sharding.
        params: parameters.
        x0: (B, H, W, C), the images.
        numbers: (B,), their numbers in the split, from which their keys follow.
        *labels: (B,), their classes, if the network is conditional.

    Returns:
        The program.
    """

    def on_mesh(key, params, x0, numbers, *labels):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return function(keys, mesh.whole(exp.mesh, params), x0, *labels)

    arguments = key, params, x0, numbers, *labels
    return exp.implementation.compile(on_mesh, *arguments, out_shardings=mesh.replicated(exp.mesh))


def choose_variance(config: ConfigDict) -> str:
    """Resolve likelihood.variance 'auto': 'learned' if the model learns it and η = 1, else 'small'."""
    asked = config.likelihood
    learned = config.model.variance == 'learned' and asked.eta == 1
    return ('learned' if learned else 'small') if asked.variance == 'auto' else asked.variance


def chain_levels(asked: ConfigDict, exp: Experiment) -> np.ndarray:
    """Return the noise levels of the chain that config.likelihood asks for."""
    return timesteps(exp.schedule.T, asked.num_steps or exp.schedule.T)


class ZeroNetwork(Network):
    """A network that takes no time to trace."""

    def net(self, params: Any, labels: Any = None, *, dropout_key: jax.Array | None = None) -> Callable:
        """Return the callable whose output is 0."""
        return lambda x_t, t: jnp.zeros_like(jnp.concatenate([x_t, x_t], axis=-1) if self.learns_variance else x_t)


def check_shapes(config: ConfigDict, exp: Experiment) -> None:
    """Raise ValueError where the quantities would, within a second and without computing anything."""
    size = config.data.image_size
    x0 = jax.ShapeDtypeStruct((1, size, size, config.data.channels), np.float32)
    network = ZeroNetwork(exp.network.make, learns_variance=exp.network.learns_variance)
    for function in quantities(config, dataclasses.replace(exp, network=network)).values():
        jax.eval_shape(function, jax.random.split(jax.random.key(0), 1), None, x0)


def require_enough(asked: ConfigDict, images: data.Images) -> None:
    """Raise RunError if more images are asked for than the split has."""
    if asked.num_images > len(images):
        raise RunError(
            f'config.likelihood.num_images is {asked.num_images}, but the {asked.split} split has {len(images)}'
        )


class Part(NamedTuple):
    """A quantity of the images start … stop−1, which is computed and kept as one file."""

    quantity: str
    trajectory: int  # of 'importance'; 0 for the others
    start: int
    stop: int

    def path(self, folder: str) -> str:
        """Return the file of the part."""
        return os.path.join(folder, 'parts', f'{self.quantity}-{self.trajectory}-{self.start:08d}.npz')


def one_sided(images: data.Images, count: int) -> str:
    """Return why the first images do not stand for the split: it is sorted by class, as folders are; else ''."""
    if images.labels is None or count == len(images) or (np.diff(images.labels) < 0).any():
        return ''
    classes, some = (len(np.unique(labels)) for labels in (images.labels, images.labels[:count]))
    if some == classes:
        return ''
    return f'the split is sorted by class, and its first {count} images are of {some} of {classes} classes'


def all_parts(asked: ConfigDict, num_images: int) -> list[Part]:
    """Return the parts that config.likelihood consists of."""
    return [
        Part(quantity, trajectory, start, min(start + asked.batch_size, num_images))
        for start in range(0, num_images, asked.batch_size)
        for quantity in asked.quantities
        for trajectory in range(asked.samples if quantity == 'importance' else 1)
    ]


def compute(
    functions: dict[str, Callable],
    parts: list[Part],
    folder: str,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray | None,
    asked: ConfigDict,
    exp: Experiment,
    interrupt: Interrupt,
) -> int:
    """Compute and keep the parts that are missing; return how many parts there are now."""
    workdir.make_folder(folder, 'parts')
    there = hosts.from_first(np.array([os.path.isfile(part.path(folder)) for part in parts]))
    missing = [part for part, found in zip(parts, there, strict=True) if not found]
    size = min(asked.batch_size, len(images))
    size += -size % exp.mesh.size

    programs: dict[str, Callable] = {}
    stopped = hosts.AnyHost(exp.mesh)
    done = len(parts) - len(missing)
    bar = progress(total=len(parts), initial=done, doing='likelihood', unit='part', hidden=not hosts.is_first())
    with bar, jax.default_matmul_precision('highest'):
        for part in missing:
            if stopped(interrupt):
                break
            bar.set_postfix_str(f'{part.quantity}, images {part.start}–{part.stop - 1}')
            numbers = np.arange(part.start, part.start + size, dtype=np.int32) % len(images)
            key = domain_key(asked.seed, 'likelihood')
            for number in (QUANTITIES.index(part.quantity), part.trajectory):
                key = jax.random.fold_in(key, number)
            batch = [data.to_float(images[numbers]), numbers, *([] if labels is None else [labels[numbers]])]
            arguments = key, params, *(mesh.put_whole(x, mesh.split_batch(exp.mesh)) for x in batch)
            if part.quantity not in programs:
                with naming('config.likelihood'), compiling(f'the quantity {part.quantity}'):
                    programs[part.quantity] = compile_quantity(exp, functions[part.quantity], *arguments)
            terms = mesh.fetch(programs[part.quantity](*arguments))
            if hosts.is_first():
                count = part.stop - part.start
                kept = {name: np.broadcast_to(v, (size, *v.shape[1:]))[:count] for name, v in terms.items()}
                with workdir.writing(folder, key='likelihood.folder'):
                    _save(part.path(folder), kept)
            bar.update()
            done += 1
    return done


def summarize(
    parts: list[Part],
    folder: str,
    config: ConfigDict,
    settings: dict[str, Any],
    labels: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[dict, dict]:
    """Put the parts together, over all images and, if there are labels, over those of each class.

    Returns:
        (consistency, record): the consistency terms of each form, (images, levels); the contents of ledger.json.
    """
    asked = config.likelihood
    size = config.data.image_size**2 * config.data.channels
    loaded: dict[tuple[str, int], list[dict[str, np.ndarray]]] = {}
    for part in parts:
        loaded.setdefault((part.quantity, part.trajectory), []).append(read_npz(part.path(folder)))

    def whole(quantity, trajectory=0):
        found = loaded[quantity, trajectory]
        return {name: np.concatenate([terms[name] for terms in found]) for name in found[0]}

    values = {quantity: whole(quantity) for quantity in asked.quantities if quantity != 'importance'}
    consistency = {form: values[form].pop('consistency') for form in FORMS if form in values}
    for form, terms in consistency.items():
        values[form]['consistency'] = terms.sum(axis=1, dtype=np.float64)
    solver_steps = values['flow'].pop('num_steps') if 'flow' in values else None
    errors = {name: mean_error(terms.pop('error', None)) for name, terms in values.items()}
    if 'importance' in asked.quantities:
        values['importance'] = np.stack([whole('importance', k)['log_weight'] for k in range(asked.samples)])

    record: dict[str, Any] = {
        'rows': [row._asdict() for row in ledger.ledger(values, size)],
        **({} if labels is None else {'classes': of_classes(values, size, labels, classes or ())}),
        'error_of_the_draws': {name: error for name, error in errors.items() if error is not None},
        'settings': settings,
    }
    if 'importance' in values:
        bounds = ledger.importance_bounds(values['importance'])
        record['effective_samples'] = {k: float(count.mean()) for k, (_, count) in bounds.items()}
    if solver_steps is not None:
        probes = num_probes(None if asked.probes < 0 else asked.probes, size)
        record['solver'] = {
            'method': 'Tsit5',
            'steps_mean': float(solver_steps.mean()),
            'divergence': f'{probes} Rademacher probe{"s" * (probes > 1)} per image' if probes else 'exact',
        }
    return consistency, record


def of_classes(values: dict[str, Any], size: int, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return {'label', 'name', 'rows': those of the ledger of its images} of each class that has images."""
    found = []
    for label in np.unique(labels).tolist():
        of_class = jax.tree.map(lambda value, mine=labels == label: value[..., mine], values)
        rows = [row._asdict() for row in ledger.ledger(of_class, size)]
        found.append({'label': label, 'name': classes[label], 'rows': rows})
    return found


def mean_error(errors: np.ndarray | None) -> float | None:
    """Return the standard error of a mean over images whose draws are independent; None if one draw is all there is.

    Args:
        errors: (n,) the standard error of each image, from its own draws; None if it has one draw.
    """
    if errors is None or not np.isfinite(errors).all():
        return None
    return float(math.sqrt((errors.astype(np.float64) ** 2).sum()) / len(errors))


def plot_terms(folder: str, consistency: dict[str, np.ndarray], asked: ConfigDict, exp: Experiment) -> list[str]:
    """Write terms.png, the consistency terms over the noise levels; return the names of what was written."""
    drawn = {f'{form} form': consistency[form] for form in ('transition', 'posterior') if form in consistency}
    levels = chain_levels(asked, exp)[1:-1]
    if not drawn or not len(levels) or len(next(iter(drawn.values()))) < 2:
        return []
    first = strata(len(levels), asked.levels or len(levels))
    centers = np.add.reduceat(levels, first[:-1]) / np.diff(first)
    with workdir.writing(folder, key='likelihood.folder'):
        per_level = {name: terms / np.diff(first) for name, terms in drawn.items()}
        save_terms(os.path.join(folder, 'terms.png'), centers, per_level)
    return ['terms.png']


def _save(path, arrays):
    """Write an .npz file atomically."""
    with replacing(path) as file:
        np.savez(file, **arrays)
