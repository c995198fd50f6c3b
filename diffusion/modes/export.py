"""--mode=export: a folder that diffusers loads as it is, with a model card, or the parameters as named arrays."""

import contextlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict
from safetensors import SafetensorError

from diffusion import build, compat, workdir
from diffusion.build import Experiment
from diffusion.interop import diffusers, diffusers_export
from diffusion.interop.tensors import to_arrays
from diffusion.interop.weights import write_safetensors
from diffusion.networks import embedding
from diffusion.runtime import hosts, mesh
from diffusion.util import naming, open_regular, read_json, replacing, versions, with_error, write_json, write_text

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusers
- pytorch
- ddpm
- ddim
---

# {title}

A denoising diffusion model of {size} images, {count:,} parameters.

{usage}
{spacing}{samples}{likelihood}
## Record

| | |
|---|---|
{record}
"""

PIPELINES = """```python
from diffusers import DDIMPipeline, DDPMPipeline

ddpm = DDPMPipeline.from_pretrained('PATH_OR_ID')
ddpm(batch_size=4, num_inference_steps={T}).images
ddim = DDIMPipeline.from_pretrained('PATH_OR_ID')
ddim(batch_size=4, num_inference_steps={short}, eta=0.0, use_clipped_model_output={clip}).images
```"""
LEARNED = """```python
from diffusers import DDPMPipeline

ddpm = DDPMPipeline.from_pretrained('PATH_OR_ID')
ddpm(batch_size=4, num_inference_steps={T}).images
```

The model learns the variance (arXiv:2102.09672). DDIMPipeline cannot use it: it expects as many outputs as inputs."""
# No pipeline of theirs passes classes to a UNet2DModel.
CONDITIONAL = """```python
import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained('PATH_OR_ID', subfolder='unet')
scheduler = DDIMScheduler.from_pretrained('PATH_OR_ID', subfolder='scheduler')
scheduler.set_timesteps({short})
labels = torch.arange(4) % {num_classes}  # the classes are 0 to {last}{no_class}
images = torch.randn(len(labels), {channels}, {image_size}, {image_size})  # in [-1, 1] at the end
with torch.no_grad():
    for t in scheduler.timesteps:
        output = unet(images, t, class_labels=labels).sample[:, :{channels}]  # without a learned variance
        images = scheduler.step(output, t, images, use_clipped_model_output={clip}).prev_sample
```"""


def run(config: ConfigDict, path: str) -> int:
    """Write export/<name>/ from a checkpoint.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        The exit status, 0.

    Raises:
        RunError: there is no checkpoint, or diffusers cannot express the network.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    label_dropout = (workdir.read_config(path) or {}).get('train', {}).get('label_dropout')
    no_class = bool(config.model.num_classes and label_dropout)  # whether the run trained an unconditional model
    exp = build.build(config)
    with naming('config.interop'):
        asked = config.interop
        step, params = workdir.load_params(exp.abstract_state(), config, path, asked.weights, asked.step)
    params = jax.tree.map(mesh.gather, params)  # all hosts take part
    if asked.format == 'arrays':
        return write_arrays(config, path, step, params) if hosts.is_first() else 0
    with naming('config.sample'):
        exp.network.require_variance(config.sample.variance)
    with naming('config.model'), advising_arrays():
        network = diffusers_network(config, no_class)
        scheduler = diffusers_scheduler(config, exp)
    if not hosts.is_first():
        return 0

    # Compute.
    theirs = params
    if config.model.first_level == 1:  # diffusers' timestep is our level less one
        model = config.model
        kernel = embedding.advance(params['time1']['kernel'], model.embedding_order, model.embedding_shift)
        theirs = params | {'time1': params['time1'] | {'kernel': kernel}}

    # Record and report.
    folder = workdir.output_folder(config, path, 'interop', 'export', f'step{step}-{asked.weights}')
    with workdir.writing(folder, SafetensorError, key='interop.folder'):  # raised when the disk is full
        diffusers_export.write(folder, theirs, network=network, scheduler=scheduler)
        write_card(folder, config, path, step, params, no_class)
    workdir.wrote(folder, 'README.md', 'unet')
    return 0


def write_arrays(config: ConfigDict, path: str, step: int, params: Any) -> int:
    """Write the parameters in one file, each as the array that it is, and a record of what they are."""
    folder = workdir.output_folder(config, path, 'interop', 'export', f'step{step}-{config.interop.weights}-arrays')
    with workdir.writing(folder, SafetensorError, key='interop.folder'):
        write_safetensors(os.path.join(folder, 'params.safetensors'), to_arrays(params))
        write_json(os.path.join(folder, 'record.json'), make_record(config, step, workdir.digest(params)))
    workdir.wrote(folder, 'params.safetensors', 'record.json')
    return 0


def diffusers_network(config: ConfigDict, no_class: bool = False) -> dict[str, Any]:
    """Return the config.json of a UNet2DModel that equals config.model.

    Args:
        config: the config of the run.
        no_class: whether a conditional network was also trained without classes.

    Raises:
        ValueError: there is none.
    """
    arguments = inspect.signature(diffusers_export.network_config).parameters
    return diffusers_export.network_config(
        image_size=config.data.image_size,
        image_channels=config.data.channels,
        no_class=no_class,
        **{key: value for key, value in config.model.items() if key in arguments},
    )


@contextlib.contextmanager
def advising_arrays() -> Iterator[None]:
    """Add to a ValueError within the context how the parameters can be exported nevertheless."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{error}; --config.interop.format=arrays exports any network, for other programs') from error


def diffusers_scheduler(config: ConfigDict, exp: Experiment) -> dict[str, Any]:
    """Return the config of a scheduler that equals config.schedule, config.sample and config.model.kind.

    Raises:
        ValueError: there is none.
    """
    schedule, asked = config.schedule, config.sample
    same = schedule.name != 'cosine' or (schedule.offset, schedule.max_beta) == (0.008, 0.999)
    return diffusers_export.scheduler_config(
        name=schedule.name if same else None,
        T=schedule.T,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        betas=exp.schedule.betas(),
        zero_terminal_snr=schedule.zero_terminal_snr,
        kind=config.model.kind,
        # That of DDPMScheduler; DDIMScheduler has none. Without 'learned_range' it would not split a doubled output.
        variance='learned' if exp.network.learns_variance else compat.choose_variance(asked.variance, 1),
        clip=asked.clip,
        spacing=asked.spacing,
    )


def as_imported(config: ConfigDict, step: int) -> bool:
    """Return whether the parameters are another project's, as they were imported."""
    return step == 0 and bool(config.interop.source)


def make_record(config: ConfigDict, step: int, digest: str) -> dict[str, Any]:
    """Return {name: value} of what the parameters are, without the folders of this machine.

    The images and settings of a training are left out if there was none.
    """
    trained = not as_imported(config, step)
    return {
        'checkpoint step': step,
        'weights': config.interop.weights,
        'params_sha256 before export': digest,
        **{
            f'{part}.{key}': value
            for part in ('data', 'model', 'schedule', 'train')
            for key, value in config[part].to_dict().items()
            if key not in workdir.INCIDENTAL
            and (trained or part in ('model', 'schedule') or key in ('image_size', 'channels'))
        },
        **({'data.source': public(config.data.source)} if trained else {}),
        **({'imported from': public(config.interop.source)} if config.interop.source else {}),
        **versions(),
    }


def write_card(folder: str, config: ConfigDict, path: str, step: int, params: Any, no_class: bool = False) -> None:
    """Write README.md: how to use the model, its samples and likelihoods if there are any, and the run's record."""
    digest = workdir.digest(params)
    data, num_classes = config.data, config.model.num_classes
    learned = config.model.variance == 'learned'
    origin = config.interop.source if as_imported(config, step) else data.source
    usage = (CONDITIONAL if num_classes else LEARNED if learned else PIPELINES).format(
        T=config.schedule.T,
        short=min(50, config.schedule.T),
        clip=config.sample.clip,
        num_classes=num_classes,
        last=num_classes - 1,
        no_class=f', and {num_classes} is no class' if no_class else '',
        channels=data.channels,
        image_size=data.image_size,
    )
    card = CARD.format(
        title=f'{public(origin)} at {data.image_size}×{data.image_size}, DDPM',
        size=f'{data.image_size}×{data.image_size}×{data.channels}',
        count=sum(leaf.size for leaf in jax.tree.leaves(params)),
        usage=usage,
        spacing=spacing_note(config.sample.spacing),
        samples=samples_section(folder, path, digest),
        likelihood=likelihood_section(folder, path, digest),
        record='\n'.join(f'| {key} | {value} |' for key, value in make_record(config, step, digest).items()),
    )
    write_text(os.path.join(folder, 'README.md'), card)


def samples_section(folder: str, path: str, digest: str) -> str:
    """Copy the newest grid that these parameters drew, and return the text about it; '' if there is none."""
    drawn, details = newest(path, 'samples', 'record.json', lambda record: record['params_sha256'] == digest)
    if not drawn:
        return ''
    copy(os.path.join(drawn, 'grid.png'), folder)
    keys = ('weights', 'rule', 'num_steps', 'spacing', 'eta', 'variance', 'clip', 'compat', 'labels', 'guidance')
    how = ', '.join(f'{key} {details[key]!r}' for key in (*keys, 'guidance_interval', 'seed') if key in details)
    measured = ''.join(
        f'{entry["name"]} of {entry["n"]} images: {with_error(entry["value"], entry["standard_error"])}.\n'
        for entry in details['metrics']
        if 'label' not in entry
    )
    return f'\n![samples](grid.png)\n\nDrawn with {how}.\n{measured}'


def likelihood_section(folder: str, path: str, digest: str) -> str:
    """Copy the newest ledger of these parameters, and return its table; '' if there is none."""
    measured, _ = newest(
        path, 'likelihood', 'ledger.json', lambda record: record['settings']['params_sha256'] == digest
    )
    if not measured:
        return ''
    copy(os.path.join(measured, 'ledger.json'), folder)
    with open_regular(os.path.join(measured, 'ledger.md')) as file:
        return f'\n## Likelihood\n\n{file.read().strip()}\n'


def copy(path: str, folder: str) -> None:
    """Copy a file into a folder; a link of its name there is replaced."""
    with open(path, 'rb') as source, replacing(os.path.join(folder, os.path.basename(path))) as target:
        shutil.copyfileobj(source, target)


def spacing_note(spacing: str) -> str:
    """Return a line about a spacing that the pipelines lack, or whose steps in their DDIM differ; else ''."""
    if spacing not in diffusers.SPACINGS:
        return f"\nThe spacing of the run, '{spacing}', is none of diffusers'; its scheduler is set to 'leading'.\n"
    if spacing == 'linspace':
        return "\nWith 'linspace', diffusers' DDIM goes steps of T/num_inference_steps, not from level to level.\n"
    return ''


def public(source: str) -> str:
    """Return a source of images or weights, PROJECT:PLACE, without the folders of this machine."""
    project, _, place = source.partition(':')
    place = os.path.expanduser(place)
    is_path = os.path.isabs(place) or place.startswith('.') or os.path.exists(place)  # it may be gone by now
    return f'{project}:{os.path.basename(place.rstrip("/"))}' if is_path else source


def newest(path: str, kind: str, file: str, accept: Callable[[dict], bool]) -> tuple[str, dict[str, Any]]:
    """Return (folder, record) of the newest <kind>/*/ whose record, a JSON file in it, is accepted; or ('', {})."""
    found = []
    for entry in os.scandir(os.path.join(path, kind)) if os.path.isdir(os.path.join(path, kind)) else ():
        record_path = os.path.join(entry.path, file)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
            record = read_json(record_path)
            if accept(record):
                found.append((os.path.getmtime(record_path), entry.path, record))
    return max(found, key=lambda entry: entry[:2])[1:] if found else ('', {})
