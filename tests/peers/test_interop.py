"""Folders and checkpoints that diffusers and PyTorch wrote are imported; what is exported, diffusers reads.

`python -m tests.peers.test_interop` rewrites tests/fixtures/pipeline.
"""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion import build, compat, sampler, schedule, workdir
from diffusion.configs import workdir as configs_workdir
from diffusion.modes import export, import_weights
from diffusion.util import RunError
from tests.interop.fixture import PIPELINE
from tests.runs import make_run, random_params, tiny

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
EMAModel = pytest.importorskip('diffusers.training_utils').EMAModel
pytestmark = pytest.mark.peers

# ruff: noqa: E402 (after what may be missing)
from tests.peers.test_diffusers import LAYOUTS, call, distance, inputs, jit, randomized, their_network

LAYOUT = LAYOUTS['attention']


def import_to(path, source, changes=None):
    """Run --mode=import_weights with a tiny config for the digits."""
    assert import_weights.run(tiny({'interop.source': source} | (changes or {})), str(path)) == 0


def save_pipeline(folder, network, scheduler=None):
    diffusers.DDPMPipeline(network, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def network():
    return their_network(**LAYOUT)


def net_of(path, weights='ema'):
    """The network of a workdir, with the config that it holds."""
    config = configs_workdir.get_config(str(path))
    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(path), weights)
    return exp.network.net(params)


def assert_equal_networks(path, network, weights='ema'):
    """A workdir's network computes at level t what theirs computes at timestep t − 1."""
    x, t = inputs(LAYOUT, t=[1, 2, 38, 1000])
    assert distance(jit(net_of(path, weights))(x, t), call(network, x, t - 1)) < 1e-5


# ── The fixture of tests/interop/fixture.py ──────────────────────────────────────────────────────────────────────────

SMALL = dict(image_size=8, image_channels=1, channels=4, multipliers=(1, 2), num_blocks=1, attention=(4,), groups=2)


def expected(pipeline):
    """What diffusers computes with the fixture: outputs at some timesteps, and images of DDIM in 10 steps."""
    x, t = inputs(SMALL, t=[0, 1, 37, 99])
    x_T = np.random.default_rng(2).normal(size=(4, 8, 8, 1)).astype(np.float32)
    images = torch.as_tensor(x_T).permute(0, 3, 1, 2)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            images = scheduler.step(pipeline.unet(images, timestep).sample, timestep, images, eta=0.0).prev_sample
    ddim = images.permute(0, 2, 3, 1).numpy()
    return dict(x=x, t=t, output=call(pipeline.unet, x, t).numpy(), x_T=x_T, ddim=ddim)


def test_the_fixture_is_what_diffusers_computes():
    pipeline = diffusers.DDPMPipeline.from_pretrained(PIPELINE)
    with np.load(PIPELINE / 'expected.npz') as stored:
        for name, array in expected(pipeline).items():
            np.testing.assert_allclose(stored[name], array, rtol=1e-5, atol=1e-6)
            assert array.std() > 0.1


# ── diffusers → us ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize('form', ['pipeline', 'flat', 'network alone', 'sharded', 'fp16', 'bf16', 'bin', 'old names'])
def test_every_form_of_folder(form, network, tmp_path):
    folder, workdir = tmp_path / 'theirs', tmp_path / 'ours'
    variant = {'fp16': torch.float16, 'bf16': torch.bfloat16}.get(form)
    if variant:
        network = network.to(variant)
    how = {'network alone': {}, 'sharded': {'max_shard_size': '40KB'}, 'bin': {'safe_serialization': False}}
    if form in how:
        network.save_pretrained(folder, **how[form])
    else:
        save_pipeline(folder, network)
    if form == 'sharded':
        assert len(list(folder.glob('*.safetensors'))) > 2
    if form == 'flat':
        for path in [*folder.glob('unet/*'), *folder.glob('scheduler/*')]:
            path.rename(folder / path.name)
    if form == 'old names':  # as the files of 2022 have them, which diffusers still renames
        path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
        old = {}
        for name, tensor in load_file(path).items():
            for new, was in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')):
                name = name.replace(f'.{new}.', f'.{was}.')
            old[name] = tensor
        assert old.keys() != load_file(path).keys()
        save_file(old, path, metadata={'format': 'pt'})
        network = diffusers.UNet2DModel.from_pretrained(folder / 'unet')
    import_to(workdir, f'diffusers:{folder}')
    assert_equal_networks(workdir, network.float())


def test_a_checkpoint_of_the_training_script(network, tmp_path):
    """The network as it was at that step and, in unet_ema, its average."""
    folder, path = tmp_path / 'checkpoint-500', tmp_path / 'ours'
    ema = EMAModel(network.parameters(), model_cls=diffusers.UNet2DModel, model_config=network.config)
    ema.save_pretrained(folder / 'unet_ema')
    raw = randomized(diffusers.UNet2DModel.from_config(network.config))
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.mul_(1.5)
    raw.save_pretrained(folder / 'unet')
    import_to(path, f'diffusers:{folder}')
    config = configs_workdir.get_config(str(path))
    exp = build.build(config)
    x, t = inputs(LAYOUT, t=[1, 2, 38, 1000])
    ours = jit(lambda params: exp.network.net(params)(x, t))
    for which, theirs in (('raw', raw), ('ema', network)):
        _, params = workdir.load_params(exp.abstract_state(), config, str(path), which)
        assert distance(ours(params), call(theirs, x, t - 1)) < 1e-5


# UNet2DModels that others train: by diffusers' script, in its course, with all defaults; narrower than these are.
OTHERS = {
    'the training script': dict(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16, 32, 32),
        down_block_types=('DownBlock2D',) * 4 + ('AttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'AttnUpBlock2D') + ('UpBlock2D',) * 4,
    ),
    'butterflies': dict(
        sample_size=32,
        block_out_channels=(16, 32, 32, 64),
        down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'),
    ),
    'MNIST': dict(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 32),
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
    ),
    'defaults': dict(block_out_channels=(8, 16, 24, 32)),
    'wide heads': dict(sample_size=16, block_out_channels=(32, 64, 64, 64), attention_head_dim=32, freq_shift=1),
    'parts of Ho': dict(
        sample_size=8, block_out_channels=(8, 16, 16, 16), downsample_padding=0, norm_eps=1e-6, flip_sin_to_cos=False
    ),
    'scale and shift': dict(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
        resnet_time_scale_shift='scale_shift',
        attn_norm_num_groups=4,
    ),
    'resnet sampling': dict(  # which blocks without attention do not have
        sample_size=16,
        block_out_channels=(8, 16, 16),
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        downsample_type='resnet',
        upsample_type='resnet',
    ),
    'resnet blocks': dict(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        down_block_types=('ResnetDownsampleBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('ResnetUpsampleBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        downsample_type='resnet',
        upsample_type='resnet',
        resnet_time_scale_shift='scale_shift',
        attn_norm_num_groups=4,
    ),
    'no attention in the middle': dict(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=('AttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'AttnUpBlock2D'),
        add_attention=False,
    ),
    'no attention': dict(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=('DownBlock2D',) * 2,
        up_block_types=('UpBlock2D',) * 2,
        add_attention=False,
        resnet_time_scale_shift='scale_shift',
    ),
}
SCRIPT = OTHERS['the training script']
SMALL_ATTENTION = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
)

# Pipelines: a network, and its scheduler.
PIPELINES = {name: (network, dict(clip_sample=False)) for name, network in OTHERS.items()} | {
    'the training script at 32': (SCRIPT | {'sample_size': 32}, {}),
    'the training script at 128': (
        SCRIPT | {'sample_size': 128, 'block_out_channels': (8, 8, 8, 8, 16, 16)},
        dict(clip_sample=False),
    ),
    'x0 by a cosine schedule': (
        SMALL_ATTENTION,
        dict(beta_schedule='squaredcos_cap_v2', prediction_type='sample', timestep_spacing='trailing'),
    ),
    'v by a quadratic schedule': (
        SMALL_ATTENTION,
        dict(beta_schedule='scaled_linear', prediction_type='v_prediction', timestep_spacing='linspace'),
    ),
    'v without clipping': (
        SMALL_ATTENTION,
        dict(num_train_timesteps=400, beta_end=0.04, prediction_type='v_prediction', clip_sample=False),
    ),
    'zero terminal SNR': (
        SMALL_ATTENTION,
        dict(rescale_betas_zero_snr=True, prediction_type='v_prediction', timestep_spacing='trailing'),
    ),
    'zero terminal SNR of x0, from betas in a list': (
        SMALL_ATTENTION,
        dict(
            rescale_betas_zero_snr=True,
            prediction_type='sample',
            trained_betas=np.linspace(1e-4, 0.02, 1000).tolist(),
        ),
    ),
    'betas in a list': (SMALL_ATTENTION, dict(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist())),
    'a learned variance': (SMALL_ATTENTION | {'out_channels': 6}, dict(variance_type='learned_range')),
    'a DDIM scheduler': (SMALL_ATTENTION, dict(cls='DDIMParallelScheduler', timestep_spacing='trailing')),
    'classes': (SMALL_ATTENTION | {'num_class_embeds': 10}, {}),
}


@pytest.mark.parametrize('name', PIPELINES)
def test_pipelines_of_others(name, tmp_path):
    """Equal outputs, equal trajectories of DDIM in 10 steps with the settings of the files, and back to the network."""
    kind, how = PIPELINES[name]
    network = randomized(diffusers.UNet2DModel(norm_num_groups=4, **{'layers_per_block': 1} | kind))
    scheduler = getattr(diffusers, how.get('cls', 'DDPMScheduler'))(**{k: v for k, v in how.items() if k != 'cls'})
    size, channels = network.config.sample_size or 16, network.config.in_channels
    network.save_pretrained(tmp_path / 'theirs' / 'unet')
    scheduler.save_pretrained(tmp_path / 'theirs' / 'scheduler')
    path = tmp_path / 'ours'
    import_to(path, f'diffusers:{tmp_path / "theirs"}', {'data.image_size': size})
    config = configs_workdir.get_config(str(path))
    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(path), 'ema')
    T = exp.schedule.T
    x, t = inputs({'image_size': size, 'image_channels': channels}, t=[1, 2, 38, T])
    labels = [np.array([3, 0, 9, 9], np.int32)] * ('num_class_embeds' in kind)

    def their_output(network, x, timesteps):
        given = {'class_labels': torch.as_tensor(labels[0][: len(x)]).long()} if labels else {}
        with torch.no_grad():
            return network(x, torch.as_tensor(timesteps), **given).sample

    def their_images(network, x, timesteps):
        return their_output(network, torch.as_tensor(x).permute(0, 3, 1, 2), timesteps).permute(0, 2, 3, 1)

    net = exp.network.net(params, *labels)
    assert distance(jit(net)(x, t), their_images(network, x, t - 1)) < 1e-5

    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(10)
    theirs = torch.as_tensor(x[:2]).permute(0, 3, 1, 2)
    for timestep in ddim.timesteps:
        mean = their_output(network, theirs, timestep)[:, :channels]
        theirs = ddim.step(mean, timestep, theirs, eta=0.0).prev_sample
    asked = {key: config.sample[key] for key in ('spacing', 'clip')}
    chain = compat.resolve('diffusers-ddim', T, num_steps=10, eta=0.0, variance='small', **asked)
    del chain['num_steps'], chain['spacing']
    keys = jax.random.split(jax.random.key(0), 2)
    mine = exp.network.for_variance(exp.network.net(params, *(array[:2] for array in labels)), 'small')
    chain |= dict(shape=x.shape[1:], kind=config.model.kind)
    ours = jit(lambda x_T: sampler.sample(keys, exp.schedule, mine, x_T=x_T, **chain))(x[:2])
    assert distance(ours, theirs.permute(0, 2, 3, 1)) < 1e-4

    assert export.run(config, str(path)) == 0
    again = diffusers.UNet2DModel.from_pretrained(path / 'export' / 'step0-ema', subfolder='unet')
    assert distance(their_images(again, x, t - 1), their_images(network, x, t - 1)) < 1e-6


def test_networks_of_classes(tmp_path):
    """Equal outputs by class, and back to the same network; trained with hidden labels, with one more class."""
    network = randomized(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=10,
        )
    )
    folder, path = save_pipeline(tmp_path / 'theirs', network), tmp_path / 'ours'
    import_to(path, f'diffusers:{folder}')
    config = configs_workdir.get_config(str(path))
    assert config.data.labels and config.model.num_classes == 10
    x, t = inputs({'image_size': 8, 'image_channels': 3}, t=[1, 2, 38, 1000])
    labels = np.array([3, 0, 9, 9], np.int32)

    def their_output(network, labels, t=t):
        images = torch.as_tensor(x).permute(0, 3, 1, 2)
        with torch.no_grad():
            output = network(images, torch.as_tensor(t - 1), class_labels=torch.as_tensor(labels).long()).sample
        return output.permute(0, 2, 3, 1)

    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(path), 'ema')
    ours = jit(lambda labels: exp.network.net(params, labels)(x, t))
    assert distance(ours(labels), their_output(network, labels)) < 1e-5

    assert export.run(config, str(path)) == 0
    again = diffusers.UNet2DModel.from_pretrained(path / 'export' / 'step0-ema', subfolder='unet')
    assert distance(their_output(again, labels), their_output(network, labels)) < 1e-6

    config.train.label_dropout = 0.1
    own = make_run(tmp_path / 'trained', config, 5, params=params, ema=params)
    assert export.run(config, str(own)) == 0
    again = diffusers.UNet2DModel.from_pretrained(own / 'export' / 'step5-ema', subfolder='unet')
    some = np.array([3, -1, 9, -1], np.int32)
    assert distance(ours(some), their_output(again, some % 11)) < 1e-5


@pytest.mark.parametrize(
    ('scheduler', 'settings'),
    [
        (
            dict(beta_schedule='scaled_linear', variance_type='fixed_large', clip_sample=False, beta_end=0.012),
            {
                'schedule': {'name': 'quadratic', 'T': 1000, 'beta_start': 1e-4, 'beta_end': 0.012},
                'model': {'kind': 'eps'},
                'sample': {'eta': 1.0, 'variance': 'auto', 'clip': False, 'spacing': 'leading', 'num_steps': 1000},
            },
        ),
        (
            dict(
                num_train_timesteps=100, beta_schedule='sigmoid', prediction_type='sample', timestep_spacing='trailing'
            ),
            {
                'schedule': {'name': 'sigmoid', 'T': 100},
                'model': {'kind': 'x0'},
                'sample': {'variance': 'small', 'clip': True, 'spacing': 'trailing', 'num_steps': 100},
            },
        ),
        (
            dict(
                cls='DDIMScheduler',
                beta_schedule='squaredcos_cap_v2',
                prediction_type='v_prediction',
                timestep_spacing='linspace',
            ),
            {
                'schedule': {'name': 'cosine', 'T': 1000},
                'model': {'kind': 'v'},
                'sample': {'eta': 0.0, 'variance': 'small', 'clip': True, 'spacing': 'linspace', 'num_steps': 50},
            },
        ),
    ],
    ids=['ddpm', 'x0', 'ddim'],
)  # fmt: skip
def test_the_scheduler_determines_the_sampling(scheduler, settings, network, tmp_path):
    """The schedule equals theirs, up to the rounding of their float32 product."""
    their_scheduler = getattr(diffusers, scheduler.pop('cls', 'DDPMScheduler'))(**scheduler)
    folder = tmp_path / 'theirs'
    network.save_pretrained(folder / 'unet')
    their_scheduler.save_pretrained(folder / 'scheduler')
    import_to(tmp_path / 'ours', f'diffusers:{folder}')
    config = configs_workdir.get_config(str(tmp_path / 'ours')).to_dict()
    for part, values in settings.items():
        assert {key: config[part][key] for key in values} == values
    ours = build.build(configs_workdir.get_config(str(tmp_path / 'ours'))).schedule
    assert len(their_scheduler.alphas_cumprod) == ours.T
    np.testing.assert_allclose(
        ours.alpha_bar(np.arange(1, ours.T + 1)), their_scheduler.alphas_cumprod, rtol=5e-5, atol=1e-6
    )


# ── The DDIM authors' checkpoints ────────────────────────────────────────────────────────────────────────────────────


def ddim_state(network, levels):
    """A state dict with the names and shapes of the DDIM code's Model and the weights of diffusers' network."""
    state = {}
    for name, tensor in network.state_dict().items():
        parts = name.split('.')
        root, rest = parts[0], parts[1:]
        if root == 'time_embedding':
            name = f'temb.dense.{int(rest[0][-1]) - 1}.{rest[1]}'
        elif root == 'conv_norm_out':
            name = f'norm_out.{rest[0]}'
        elif root in ('down_blocks', 'up_blocks', 'mid_block'):
            if root == 'mid_block':
                place = f'mid.attn_{int(rest[1]) + 1}' if rest[0] == 'attentions' else f'mid.block_{int(rest[1]) + 1}'
                leaf = rest[2:]
            else:
                direction = root.split('_')[0]
                level = int(rest[0]) if direction == 'down' else levels - 1 - int(rest[0])
                kind = {'resnets': 'block', 'attentions': 'attn'}.get(rest[1])
                place = f'{direction}.{level}.{kind}.{rest[2]}' if kind else f'{direction}.{level}.{direction}sample'
                leaf = rest[3:]
            leaf = '.'.join(leaf)
            for new, theirs in (
                ('time_emb_proj', 'temb_proj'), ('conv_shortcut', 'nin_shortcut'), ('group_norm', 'norm'),
                ('to_q', 'q'), ('to_k', 'k'), ('to_v', 'v'), ('to_out.0', 'proj_out'),
            ):  # fmt: skip
                leaf = leaf.replace(new, theirs)
            name = f'{place}.{leaf}'
            if '.attn' in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # their attention is made of 1×1 convolutions
        state[name] = tensor.clone()
    return state


# From models/diffusion.py with ch 32, ch_mult [1, 2], one block a level, attention at the lower resolution.
SOME_OF_THEIR_NAMES = {
    'temb.dense.0.weight': (128, 32),
    'conv_in.weight': (32, 3, 3, 3),
    'down.0.block.0.norm1.weight': (32,),
    'down.0.downsample.conv.weight': (32, 32, 3, 3),
    'down.1.block.0.temb_proj.weight': (64, 128),
    'down.1.block.0.nin_shortcut.weight': (64, 32, 1, 1),
    'down.1.attn.0.q.weight': (64, 64, 1, 1),
    'down.1.attn.0.proj_out.bias': (64,),
    'mid.block_1.conv1.weight': (64, 64, 3, 3),
    'mid.attn_1.norm.weight': (64,),
    'mid.block_2.norm2.bias': (64,),
    'up.0.block.1.conv1.weight': (32, 64, 3, 3),
    'up.1.attn.1.k.bias': (64,),
    'up.1.upsample.conv.weight': (64, 64, 3, 3),
    'norm_out.bias': (32,),
    'conv_out.weight': (3, 32, 3, 3),
}
DDIM_LAYOUT = dict(image_size=8, image_channels=3, channels=32, multipliers=(1, 2), num_blocks=1, attention=(4,))


@pytest.fixture(scope='module')
def ddim_network():
    return their_network(**DDIM_LAYOUT, groups=32)


@pytest.mark.parametrize('form', ['a run', 'a run without EMA', 'a converted DDPM', 'another size of image'])
def test_the_ddim_authors_checkpoints(form, ddim_network, tmp_path):
    state = ddim_state(ddim_network, levels=2)
    assert {name: tuple(state[name].shape) for name in SOME_OF_THEIR_NAMES} == SOME_OF_THEIR_NAMES
    raw = {name: 1.5 * tensor for name, tensor in state.items()}  # the EMA of a run is the network that counts
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    run = [{f'module.{name}': tensor for name, tensor in raw.items()}, optimizer.state_dict(), 7, 790_000, state]
    torch.save({'a run': run, 'a run without EMA': run[:4]}.get(form, state), tmp_path / 'model.ckpt')
    size = 16 if form == 'another size of image' else 8
    import_to(tmp_path / 'ours', f'ddim:{tmp_path / "model.ckpt"}', {'data.image_size': size})

    config = configs_workdir.get_config(str(tmp_path / 'ours'))
    assert (config.data.image_size, config.data.channels, config.model.kind) == (size, 3, 'eps')
    assert config.schedule == tiny().schedule  # the file does not say it
    assert config.model.attention_resolutions == (size // 2,)
    record = json.loads((tmp_path / 'ours' / 'import.json').read_text())
    assert record.get('step') == (790_000 if 'run' in form else None)
    x, t = inputs(DDIM_LAYOUT | {'image_size': size}, t=[1, 2, 38, 1000])
    if form == 'a run without EMA':
        ddim_network = their_network(**DDIM_LAYOUT, groups=32)
        ddim_network.load_state_dict({name: 1.5 * tensor for name, tensor in ddim_network.state_dict().items()})
    assert distance(jit(net_of(tmp_path / 'ours'))(x, t), call(ddim_network, x, t - 1)) < 1e-5
    assert (record['params_sha256'] == record['ema_sha256']) == (form != 'a run')
    if form == 'a run':
        raw = jit(net_of(tmp_path / 'ours', 'raw'))(x, t)
        assert distance(raw, jit(net_of(tmp_path / 'ours'))(x, t)) > 0.1


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


def test_a_run_whose_steps_are_tensors(ddim_network, tmp_path):
    """Steps that JSON cannot hold are null. The file is saved without checksums."""
    state = ddim_state(ddim_network, levels=2)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save([state, {}, torch.tensor(7), torch.ones(2), state], tmp_path / 'model.ckpt')
    finally:
        torch.serialization.set_crc32_options(True)
    import_to(tmp_path / 'ours', f'ddim:{tmp_path / "model.ckpt"}')
    record = json.loads((tmp_path / 'ours' / 'import.json').read_text())
    assert (record['epoch'], record['step']) == (7, None)


def test_a_flipped_bit(ddim_network, tmp_path):
    path = tmp_path / 'model.ckpt'
    torch.save(ddim_state(ddim_network, levels=2), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r'model\.ckpt is damaged: the checksum of model/data/\d+ in it'):
        import_to(tmp_path / 'ours', f'ddim:{path}')


def changed(state, change):
    """Replace one tensor of a state dict."""
    return state | {'temb.dense.0.weight': change(state['temb.dense.0.weight'])}


class Malice:
    def __reduce__(self):
        return os.mkdir, ('made-by-a-checkpoint',)


def test_the_size_of_images_is_not_in_the_file(ddim_network, tmp_path):
    torch.save(ddim_state(ddim_network, levels=2), tmp_path / 'model.ckpt')
    with pytest.raises(RunError, match=r'set config\.data\.image_size'):
        import_to(tmp_path / 'ours', f'ddim:{tmp_path / "model.ckpt"}', {'data.image_size': 0})


@pytest.mark.parametrize('content', [b'no tensors', b''])
def test_files_without_tensors_are_refused(content, tmp_path):
    (tmp_path / 'model.ckpt').write_bytes(content)
    with pytest.raises(RunError, match=r'model\.ckpt cannot be read as tensors') as error:
        import_to(tmp_path / 'ours', f'ddim:{tmp_path / "model.ckpt"}')
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (lambda state: Malice(), r'model\.ckpt cannot be read as tensors: it holds \w+\.mkdir\. No code in it was run'),
        (lambda state: state | {7: torch.ones(3)}, 'it holds 7 with Tensor'),
        (lambda state: changed(state, torch.Tensor.int), r'temb\.dense\.0\.weight as torch\.int32'),
        (lambda state: changed(state, lambda tensor: tensor + 1j), r'temb\.dense\.0\.weight as torch\.complex64'),
        (lambda state: changed(state, torch.Tensor.to_sparse), r'temb\.dense\.0\.weight as torch\.sparse_coo'),
        (lambda state: changed(state, lambda tensor: tensor.to('meta')), r'temb\.dense\.0\.weight as .* meta'),
        (
            lambda state: changed(state, lambda tensor: tensor.to(torch.float8_e4m3fn)),
            r'temb\.dense\.0\.weight as torch\.float8_e4m3fn',
        ),
        (
            lambda state: state | {f'module.{name}': tensor + 1 for name, tensor in state.items()},
            r'both (\S+) and module\.\1: delete',
        ),
        (lambda state: [state], 'list of 1'),
        (lambda state: {'state': state}, 'is not a state dict'),
        (lambda state: {'weight': torch.ones(3)}, 'conv_in.weight'),
        (lambda state: without(state, 'mid.attn_1.q.bias'), r'mid\.attn_1\.q\.bias \(64,\) is missing'),
        (
            lambda state: state | {'up.1.attn.0.k.weight': torch.ones(64, 64, 3, 3)},
            r'up\.1\.attn\.0\.k\.weight has shape \(64, 64, 3, 3\)',
        ),
    ],
)
def test_other_checkpoints_are_refused(content, words, ddim_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(ddim_state(ddim_network, levels=2)), 'model.ckpt')
    with pytest.raises(RunError, match=words) as error:
        import_to(tmp_path / 'ours', 'ddim:model.ckpt')
    assert 'model.ckpt' in str(error.value) and '\n' not in str(error.value) and 'weights_only' not in str(error.value)
    assert sorted(os.listdir()) == ['model.ckpt']  # nothing was imported, and no code was run


# ── us → diffusers ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ('name', 'kind'), [('linear', 'eps'), ('linear', 'v'), ('sigmoid', 'eps'), ('constant', 'eps')]
)
def test_an_exported_run_draws_the_same_images(name, kind, tmp_path, monkeypatch):
    """A run with levels 1 … T, in diffusers' DDIMPipeline, and in its DDPMPipeline with the noise that we draw."""
    config = tiny(
        {
            'schedule.name': name, 'schedule.T': 20, 'schedule.beta_start': 1e-3, 'schedule.beta_end': 0.3,
            'model.kind': kind, 'model.attention_resolutions': (8,), 'sample.spacing': 'leading',
        }
    )  # fmt: skip
    params = random_params(config, 1)
    workdir = make_run(tmp_path / 'ours', config, 5, params=params, ema=params)
    assert export.run(config, str(workdir)) == 0
    folder = workdir / 'export' / 'step5-ema'

    exp = build.build(config)
    keys = jax.random.split(jax.random.key(1), 3)

    def noise(level):
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), (8, 8, 1)))(keys)
        return torch.as_tensor(np.array(draw)).permute(0, 3, 1, 2)

    for pipeline, how, ask in (
        (diffusers.DDIMPipeline, dict(num_steps=10, eta=0.0, variance='small'), dict(use_clipped_model_output=True)),
        (diffusers.DDPMPipeline, dict(num_steps=20, eta=1.0, variance='small'), {}),
    ):
        levels = schedule.timesteps(20, how.pop('num_steps'), 'leading')
        net = exp.network.net(params)
        how |= dict(shape=(8, 8, 1), timesteps=levels, kind=kind)
        ours = jit(lambda keys, net=net, how=how: sampler.sample(keys, exp.schedule, net, **how))(keys)
        pipe = pipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        drawn = iter([levels[0], *levels[1:]])
        for module in ('pipelines.ddim.pipeline_ddim', 'pipelines.ddpm.pipeline_ddpm', 'schedulers.scheduling_ddpm'):
            monkeypatch.setattr(
                f'diffusers.{module}.randn_tensor', lambda *_, drawn=drawn, **__: noise(int(next(drawn)))
            )
        images = pipe(batch_size=3, num_inference_steps=len(levels) - 1, output_type='np', **ask).images
        assert images.std() > 0.1
        np.testing.assert_allclose(np.clip(np.asarray(ours) / 2 + 0.5, 0, 1), images, atol=1e-4)


def test_from_them_and_back_is_the_same_file(network, tmp_path):
    """What their DDIMPipeline saves is read as well; it keeps the keys of the scheduler that it was made from."""
    theirs = save_pipeline(tmp_path / 'theirs', network, diffusers.DDPMScheduler(variance_type='fixed_large'))
    import_to(tmp_path / 'ours', f'diffusers:{theirs}')
    assert export.run(configs_workdir.get_config(str(tmp_path / 'ours')), str(tmp_path / 'ours')) == 0
    folder = tmp_path / 'ours' / 'export' / 'step0-ema'
    weights = 'unet/diffusion_pytorch_model.safetensors'
    back, there = load_file(folder / weights), load_file(theirs / weights)
    assert back.keys() == there.keys()
    for name in back:
        np.testing.assert_array_equal(back[name], there[name])
    again = diffusers.DDPMPipeline.from_pretrained(folder)
    for config, was in (
        (again.unet.config, network.config),
        (again.scheduler.config, diffusers.DDPMScheduler(variance_type='fixed_large').config),
    ):
        for key in set(was) - {'_name_or_path', '_diffusers_version', '_use_default_values'}:
            assert json.dumps(config[key]) == json.dumps(was[key]), key  # a list or a tuple
    diffusers.DDIMPipeline.from_pretrained(folder).save_pretrained(tmp_path / 'ddim')
    import_to(tmp_path / 'again', f'diffusers:{tmp_path / "ddim"}')
    assert_equal_networks(tmp_path / 'again', network)


if __name__ == '__main__':
    shutil.rmtree(PIPELINE, ignore_errors=True)
    save_pipeline(PIPELINE, their_network(**SMALL), diffusers.DDPMScheduler(100, variance_type='fixed_large'))
    np.savez_compressed(PIPELINE / 'expected.npz', **expected(diffusers.DDPMPipeline.from_pretrained(PIPELINE)))
