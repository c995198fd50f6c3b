"""--mode=likelihood: every likelihood of the derivation, on real images, side by side."""

import dataclasses
import functools
import hashlib
import json
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion import data, experiment
from diffusion.experiment import RunError
from diffusion.likelihood import ledger
from diffusion.likelihood.elbo import FORMS, elbo, strata
from diffusion.likelihood.flow import flow, num_probes
from diffusion.likelihood.importance import log_weight
from diffusion.report.terms import save_terms
from diffusion.runtime import mesh as meshes
from diffusion.runtime.files import versions, write_json
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from diffusion.runtime.xla import compiler_options
from diffusion.schedule import timesteps

QUANTITIES = (*FORMS, 'importance', 'flow')


def quantities(config, exp):
    """{name: (key, params, x0 (B, ...)) → {part: (B, ...) nats}} of what config.likelihood asks for."""
    asked, kind = config.likelihood, config.model.kind
    common = dict(kind=kind, variance=asked.variance, clip=asked.clip)
    chain = common | dict(eta=asked.eta, timesteps=levels(asked, exp))
    solver = dict(rtol=asked.rtol, atol=asked.atol, probes=None if asked.probes < 0 else asked.probes)

    def form(key, params, x0, form):
        terms = elbo(key, exp.schedule, exp.network.net(params), x0, form=form, levels=asked.levels or None, **chain)
        return terms._asdict() | {'error': terms.standard_error()}

    def importance(key, params, x0):
        return {'log_weight': log_weight(key, exp.schedule, exp.network.net(params), x0, **chain)}

    def ode(key, params, x0):
        terms = flow(key, exp.schedule, exp.network.net(params), x0, **common, **solver)._asdict()
        return terms | {'error': terms.pop('probe_error')}

    everything = {name: functools.partial(form, form=name) for name in FORMS} | {'importance': importance, 'flow': ode}
    return {name: everything[name] for name in asked.quantities}


class Zeros:
    """A network that costs no time to trace."""

    def net(self, params):
        return lambda x_t, t: jnp.zeros_like(x_t)


def check(config, exp):
    """Raise ValueError where the quantities would, within a second: nothing is read, and no number computed."""
    size = config.data.image_size
    x0 = jax.ShapeDtypeStruct((1, size, size, config.data.channels), np.float32)
    for function in quantities(config, dataclasses.replace(exp, network=Zeros())).values():
        jax.eval_shape(function, jax.random.key(0), None, x0)


def run(config, workdir):
    """Write likelihood/<name>/, part by part, going on where an earlier call stopped. Returns the exit status."""
    asked = config.likelihood
    if not asked.quantities or not set(asked.quantities) <= set(QUANTITIES):
        raise RunError(
            f'config.likelihood.quantities is {asked.quantities}, but must name some of {", ".join(QUANTITIES)}'
        )
    config = experiment.resolve(config, workdir)
    # As exact as can be; and nothing here goes back through the layers, of which the flow's derivatives go forward.
    config.model.dtype, config.model.remat = 'float32', False
    exp = experiment.build(config)
    with experiment.naming('config.likelihood'):
        check(config, exp)
    step, params = experiment.load_params(exp, config, workdir, asked.weights)
    experiment.make_folder(workdir, 'likelihood')  # before images are decoded
    experiment.keep_programs(config, workdir)
    images = experiment.load_same_images(config, asked.split)
    if asked.num_images > len(images):
        raise RunError(
            f'config.likelihood.num_images is {asked.num_images}, but the {asked.split} split has {len(images)}'
        )
    of_images = {key: images.record[key] for key in ('sha256', 'fingerprint')}
    images = images[np.arange(asked.num_images or len(images))]

    # Whoever asks for the same of the same parameters and images finds what is done already.
    settings = {
        'checkpoint_step': step,
        **asked.to_dict(),
        'params_sha256': experiment.digest(params),
        'images': of_images,
        'versions': versions(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f'step{step}-{asked.weights}-{asked.split}-n{len(images)}-{digest}'
    folder = os.path.join(workdir, 'likelihood', name)
    parts = [
        Part(quantity, k, start, min(start + asked.batch_size, len(images)))
        for start in range(0, len(images), asked.batch_size)
        for quantity in asked.quantities
        for k in range(asked.samples if quantity == 'importance' else 1)
    ]
    with Interrupt('part') as interrupt:
        done = _compute(quantities(config, exp), parts, folder, params, images, asked, exp.mesh, interrupt)
    if done < len(parts):
        why = interrupt or 'another host was asked to stop'
        print(f'{why}: {done} of {len(parts)} parts are computed and kept; the same command goes on')
        return EXIT_STATUS

    if meshes.is_first():
        _write(folder, parts, settings, config, exp)
    return 0


class Part(NamedTuple):
    """A quantity of the images start … stop−1; k counts the trajectories of 'importance'."""

    quantity: str
    k: int
    start: int
    stop: int

    def path(self, folder):
        return os.path.join(folder, 'parts', f'{self.quantity}-{self.k}-{self.start:08d}.npz')


def _compute(functions, parts, folder, params, images, asked, mesh, interrupt):
    """Compute and keep the parts that are missing; returns how many there are now."""
    first = meshes.is_first()
    experiment.make_folder(folder, 'parts')
    there = meshes.from_first(np.array([os.path.exists(part.path(folder)) for part in parts]))
    missing = [part for part, found in zip(parts, there, strict=True) if not found]
    size = min(asked.batch_size, len(images))
    size += -size % mesh.size

    def program(function):
        def on_mesh(key, params, x0):
            return function(key, meshes.whole(mesh, params), x0)

        return jax.jit(on_mesh, out_shardings=meshes.replicated(mesh), compiler_options=compiler_options())

    programs = {name: program(function) for name, function in functions.items()}
    stopping = meshes.Agreement(mesh)
    show = dict(desc='likelihood', unit='part', dynamic_ncols=True, disable=not first)
    done = len(parts) - len(missing)
    with tqdm(total=len(parts), initial=done, **show) as bar, jax.default_matmul_precision('highest'):
        for part in missing:
            if stopping(interrupt):
                break
            bar.set_postfix_str(f'{part.quantity}, images {part.start}–{part.stop - 1}')
            batch = data.to_float(images[np.arange(part.start, part.start + size) % len(images)])
            key = jax.random.key(asked.seed)
            for number in (QUANTITIES.index(part.quantity), part.k, part.start):
                key = jax.random.fold_in(key, number)
            with experiment.naming('config.likelihood'):
                terms = programs[part.quantity](key, params, meshes.put_whole(batch, meshes.split_batch(mesh)))
            count = part.stop - part.start
            whole = {name: np.broadcast_to(v, (size, *v.shape[1:]))[:count] for name, v in terms.items()}
            if first:
                with experiment.writing(folder):
                    _save(part.path(folder), whole)
            bar.update()
            done += 1
    return done


def _save(path, arrays):
    with open(path + '.new', 'wb') as file:
        np.savez(file, **arrays)
    os.replace(path + '.new', path)


def _write(folder, parts, settings, config, exp):
    """The ledger and its picture, from the parts."""
    asked = config.likelihood
    size = config.data.image_size**2 * config.data.channels
    loaded = {}
    for part in parts:
        with np.load(part.path(folder)) as file:
            loaded.setdefault((part.quantity, part.k), []).append(dict(file))

    def whole(quantity, k=0):
        return {name: np.concatenate([terms[name] for terms in loaded[quantity, k]]) for name in loaded[quantity, k][0]}

    values = {quantity: whole(quantity) for quantity in asked.quantities if quantity != 'importance'}
    consistency = {form: values[form].pop('consistency') for form in FORMS if form in values}
    for form, terms in consistency.items():
        values[form]['consistency'] = terms.sum(axis=1, dtype=np.float64)
    solver = values['flow'].pop('num_steps') if 'flow' in values else None
    # Of the mean over images, whose draws are independent; None where one draw says nothing of its error.
    errors = {name: terms.pop('error').astype(np.float64) for name, terms in values.items()}
    errors = {name: float(math.sqrt((e**2).sum()) / len(e)) for name, e in errors.items() if np.isfinite(e).all()}
    if 'importance' in asked.quantities:
        values['importance'] = np.stack([whole('importance', k)['log_weight'] for k in range(asked.samples)])

    rows = ledger.ledger(values, size)
    record = {'rows': [row._asdict() for row in rows], 'error_of_the_draws': errors, 'settings': settings}
    if 'importance' in values:
        record['effective_samples'] = {
            k: float(count.mean()) for k, (_, count) in ledger.importance_bounds(values['importance']).items()
        }
    if solver is not None:
        probes = num_probes(None if asked.probes < 0 else asked.probes, size)
        record['solver'] = {
            'method': 'Tsit5',
            'steps_mean': float(solver.mean()),
            'divergence': f'{probes} Rademacher probe{"s" * (probes > 1)} an image' if probes else 'exact',
        }
    table = ledger.markdown(rows)
    with experiment.writing(folder):
        write_json(os.path.join(folder, 'ledger.json'), record)
        with open(os.path.join(folder, 'ledger.md'), 'w', encoding='utf-8') as file:
            file.write(table)
    print(f'{parts[-1].stop} images of the {asked.split} split of {config.data.source}, each counted once\n\n{table}')
    for name, error in errors.items():
        what = f'the divergence ({record["solver"]["divergence"]})' if name == 'flow' else 'levels and noise, at most'
        print(f'{name}: ± {error:.3f} nats by the draws of {what}')
    written = ['ledger.json', 'ledger.md']
    drawn = {f'{form} form': consistency[form] for form in ('transition', 'posterior') if form in consistency}
    pairs = levels(asked, exp)[1:-1]
    if drawn and len(pairs) and parts[-1].stop > 1:
        first = strata(len(pairs), asked.levels or len(pairs))
        centers = np.add.reduceat(pairs, first[:-1]) / np.diff(first)
        drawn = {name: terms / np.diff(first) for name, terms in drawn.items()}
        with experiment.writing(folder):
            save_terms(os.path.join(folder, 'terms.png'), centers, drawn)
        written.append('terms.png')
    for file in written:
        print(os.path.join(folder, file))


def levels(asked, exp):
    """The noise levels of the chain that config.likelihood asks for."""
    return timesteps(exp.schedule.T, asked.num_steps or exp.schedule.T)
