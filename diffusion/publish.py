"""--mode=export: a folder that diffusers' pipelines load as it is, with a model card, ready to be uploaded."""

import json
import os
import shutil

import jax
import numpy as np
from safetensors import SafetensorError

from diffusion import experiment
from diffusion.interop import diffusers
from diffusion.networks import unet
from diffusion.runtime import mesh as meshes
from diffusion.runtime.files import versions

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

```python
from diffusers import DDIMPipeline, DDPMPipeline

ddpm = DDPMPipeline.from_pretrained('PATH_OR_ID')
ddpm(batch_size=4, num_inference_steps={T}).images
ddim = DDIMPipeline.from_pretrained('PATH_OR_ID')
ddim(batch_size=4, num_inference_steps={short}, eta=0.0, use_clipped_model_output={clip}).images
```
{spacing}{samples}{likelihood}
## Record

| | |
|---|---|
{record}
"""


def run(config, workdir):
    """Write export/<name>/ from the newest checkpoint. Returns the process's exit status."""
    config = experiment.resolve(config, workdir)
    exp = experiment.build(config)
    with experiment.naming('config.interop'):
        step, params = experiment.load_params(exp, config, workdir, config.interop.weights)
    params = jax.tree.map(meshes.gather, params)  # in which all hosts take part
    model, schedule, asked = config.model, config.schedule, config.sample
    with experiment.naming('config.model'):
        network = diffusers.network_config(
            image_size=config.data.image_size,
            image_channels=config.data.channels,
            channels=model.channels,
            multipliers=model.multipliers,
            num_blocks=model.num_blocks,
            attention_resolutions=model.attention_resolutions,
            groups=model.groups,
            dropout=model.dropout,
        )
    same = schedule.name != 'cosine' or (schedule.offset, schedule.max_beta) == (0.008, 0.999)
    with experiment.naming('config.sample'):
        scheduler = diffusers.scheduler_config(
            name=schedule.name if same else None,
            T=schedule.T,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            betas=-np.expm1(np.diff(np.asarray(exp.schedule.log_alpha_bar, np.float64))),
            kind=model.kind,
            variance=asked.variance,
            clip=asked.clip,
            spacing=asked.spacing,
        )
    if not meshes.is_first():
        return 0
    theirs = params
    if model.first_level == 1:  # their timestep is our level less one
        theirs = params | {'time1': params['time1'] | {'kernel': unet.advance(params['time1']['kernel'])}}
    name = f'step{step}-{config.interop.weights}'
    folder = experiment.make_folder(workdir, 'export', name)
    with experiment.writing(folder, SafetensorError):  # as which its library tells of a full disk
        diffusers.write(folder, theirs, network=network, scheduler=scheduler)
        write_card(folder, config, workdir, step, params)
    for file in ('README.md', 'model_index.json'):
        print(os.path.join(folder, file))
    return 0


def write_card(folder, config, workdir, step, params):
    """README.md: how to use it, what it drew and how likely it finds real images, and the run's record."""
    digest = experiment.digest(params)
    data = config.data
    record = {
        'checkpoint step': step,
        'weights': config.interop.weights,
        'params_sha256 before export': digest,
        **{
            f'{part}.{key}': value
            for part in ('data', 'model', 'schedule', 'train')
            for key, value in config[part].to_dict().items()
            if key not in experiment.INCIDENTAL
        },
        'data.source': public(data.source),
        **({'imported from': public(config.interop.source)} if config.interop.source else {}),
        **versions(),
    }

    samples = likelihood = ''
    drawn, details = newest(workdir, 'samples', 'record.json', lambda record: record['params_sha256'] == digest)
    if drawn:
        shutil.copy(os.path.join(drawn, 'grid.png'), folder)
        keys = ('num_steps', 'spacing', 'eta', 'variance', 'clip', 'compat', 'seed')
        how = ', '.join(f'{key} {details[key]!r}' for key in keys)
        samples = f'\n![samples](grid.png)\n\nDrawn with {how}.\n'
        if (quality := details['quality'])['value'] is not None:
            samples += f'{quality["metric"]} of {details["count"]} images: {quality["value"]:.4f}.\n'
    measured, _ = newest(
        workdir, 'likelihood', 'ledger.json', lambda record: record['settings']['params_sha256'] == digest
    )
    if measured:
        shutil.copy(os.path.join(measured, 'ledger.json'), folder)
        with open(os.path.join(measured, 'ledger.md'), encoding='utf-8') as file:
            likelihood = f'\n## Likelihood\n\n{file.read().strip()}\n'
    card = CARD.format(
        title=f'{public(data.source)} at {data.image_size}×{data.image_size}, DDPM',
        size=f'{data.image_size}×{data.image_size}×{data.channels}',
        count=sum(leaf.size for leaf in jax.tree.leaves(params)),
        T=config.schedule.T,
        short=min(50, config.schedule.T),
        clip=config.sample.clip,
        spacing=about_spacing(config.sample.spacing),
        samples=samples,
        likelihood=likelihood,
        record='\n'.join(f'| {key} | {value} |' for key, value in record.items()),
    )
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as file:
        file.write(card)


def about_spacing(spacing):
    """A line for a spacing that the pipelines do not have, or of which their DDIM goes other steps; else ''."""
    if spacing not in diffusers.SPACINGS:
        return f"\nThe spacing chosen here, '{spacing}', is none of diffusers': its pipelines are told 'leading'.\n"
    if spacing == 'linspace':
        return "\nOf 'linspace' the DDIM of diffusers goes steps of T/num_inference_steps, not from level to level.\n"
    return ''


def public(source):
    """A source of images or weights, as PROJECT:PLACE, without the folders of this machine."""
    project, _, place = source.partition(':')
    return f'{project}:{os.path.basename(place.rstrip("/"))}' if os.path.exists(os.path.expanduser(place)) else source


def newest(workdir, kind, file, of_these):
    """(folder, record) of the newest workdir/kind/*/ whose record, a JSON file in it, is `of_these`; or ('', {})."""
    found = []
    for entry in os.scandir(os.path.join(workdir, kind)) if os.path.isdir(os.path.join(workdir, kind)) else ():
        path = os.path.join(entry.path, file)
        if os.path.exists(path):
            with open(path, encoding='utf-8') as opened:
                record = json.load(opened)
            if of_these(record):
                found.append((os.path.getmtime(path), entry.path, record))
    return max(found, key=lambda entry: entry[:2])[1:] if found else ('', {})
