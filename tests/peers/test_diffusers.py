"""diffusers as a peer: equal schedules, networks and trajectories; and the size of its error where it has one.

Its timestep t, 0 … T−1, is our level t+1, and its chain ends at timestep −1, our level 0.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion import compat, sampler, schedule
from diffusion.interop import diffusers as folders
from diffusion.interop.tensors import to_params, to_tensors
from diffusion.networks import make_rngs
from diffusion.networks.embedding import advance
from diffusion.networks.unet import UNet

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
pytestmark = pytest.mark.peers

T = 1000
SCH = schedule.linear(T)
N, SHAPE = 4, (4, 4, 3)

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # compiles in a third

# ── The schedule and its levels ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    'name, their_name',
    [('linear', 'linear'), ('quadratic', 'scaled_linear'), ('cosine', 'squaredcos_cap_v2'), ('sigmoid', 'sigmoid')],
)
def test_schedules(name, their_name):
    """Equal but for their float32 product: 1−ᾱ to 2e-4, and to a rounding of ᾱ (FIELD §2.17)."""
    alpha_bar = diffusers.DDPMScheduler(T, beta_schedule=their_name).alphas_cumprod.numpy()
    noise = schedule.SCHEDULES[name](T).noise(np.arange(1, T + 1))
    np.testing.assert_allclose(noise**2, 1 - alpha_bar, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(1 - noise**2, alpha_bar, rtol=5e-5, atol=1e-6)


def their_levels(scheduler, num_steps):
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps.numpy() + 1


@pytest.mark.parametrize('name', ['DDIMScheduler', 'DDPMScheduler'])
@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_levels(name, spacing):
    """The same levels for every number of steps; but their 'trailing' sometimes runs one step more, at level 0."""
    scheduler = getattr(diffusers, name)(T, timestep_spacing=spacing)
    longer = []
    for num_steps in range(1 if spacing == 'trailing' else 2, T + 1):
        theirs, ours = their_levels(scheduler, num_steps), schedule.timesteps(T, num_steps, spacing)
        if len(theirs) > num_steps:
            longer.append(num_steps)
            assert theirs[-1] == 0  # timestep −1, at which their table gives ᾱ_T
            theirs = theirs[:-1]
        np.testing.assert_array_equal(theirs, ours[:-1])
    if spacing == 'trailing':
        assert longer[:5] == [61, 103, 121, 122, 201]
    else:
        assert not longer


# ── The U-Net ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Their network has no parameter for multipliers[0]: it begins at the width of the first resolution.
LAYOUTS = {
    'plain': dict(image_size=8, image_channels=1, channels=8, multipliers=(1, 2), num_blocks=1, attention=()),
    'attention': dict(image_size=8, image_channels=3, channels=16, multipliers=(1, 2), num_blocks=1, attention=(4,)),
    'shallow': dict(image_size=7, image_channels=3, channels=20, multipliers=(1,), num_blocks=2, attention=(7,)),
    'deep': dict(image_size=8, image_channels=1, channels=8, multipliers=(1, 2), num_blocks=3, attention=(8, 4)),
    'odd': dict(image_size=12, image_channels=2, channels=12, multipliers=(1, 3, 2), num_blocks=1, attention=(3, 12)),
    'cifar10': dict(
        image_size=16, image_channels=3, channels=16, multipliers=(1, 2, 2, 2), num_blocks=2, attention=(8,)
    ),
    'celeba': dict(
        image_size=32, image_channels=1, channels=8, multipliers=(1, 2, 2, 2, 4), num_blocks=1, attention=(8,)
    ),
    'lsun': dict(
        image_size=64, image_channels=3, channels=8, multipliers=(1, 1, 2, 2, 4, 4), num_blocks=1, attention=(4,)
    ),
}
FULL = dict(image_size=32, image_channels=3, channels=128, multipliers=(1, 2, 2, 2), num_blocks=2, attention=(16,))


def their_network(*, image_size, image_channels, channels, multipliers, num_blocks, attention, groups=4, **change):
    """diffusers' network built as google/ddpm-cifar10-32 is, with every weight random."""
    attends = [image_size >> level in attention for level in range(len(multipliers))]
    network = diffusers.UNet2DModel(
        **dict(
            sample_size=image_size,
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in attends],
            up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)],
            block_out_channels=[channels * m for m in multipliers],
            layers_per_block=num_blocks,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            attention_head_dim=None,
            norm_num_groups=groups,
            norm_eps=1e-6,
        )
        | change
    )
    return randomized(network)


def randomized(network):
    """The network with random weights, each of which has an effect."""
    draw = np.random.default_rng(0)
    state = {}
    for name, old in network.state_dict().items():
        new = draw.standard_normal(tuple(old.shape), np.float32)
        if old.ndim > 1:
            new /= math.sqrt(math.prod(old.shape[1:]))
        else:
            new = new / 2 + ('norm' in name and name.endswith('weight'))
        if name.startswith('conv_in'):
            new /= 100  # so faint that the ε of the first norms is heard
        state[name] = torch.as_tensor(new)
    network.load_state_dict(state)
    return network.eval()


def tensors_of(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def our_network(network, *, attention, groups=4, **settings):
    """Our network and diffusers' weights for it: (graph, params)."""
    args = dict(attention_resolutions=attention, groups=groups, dropout=0.0, dtype=jnp.float32)
    graph, expected = nnx.split(nnx.eval_shape(lambda: UNet(**settings, **args, rngs=make_rngs(default=0))))
    return graph, to_params(tensors_of(network), nnx.to_pure_dict(expected), folders.names, 'their network')


@functools.partial(jit, static_argnums=0)
def our_output(graph, params, x, t):
    return nnx.merge(graph, params)(x, t)


def inputs(layout, t):
    size = layout['image_size']
    x = np.random.default_rng(1).normal(size=(len(t), size, size, layout['image_channels']))
    return x.astype(np.float32), np.array(t)


def call(network, x, t):
    """diffusers' network on images (B, H, W, C)."""
    with torch.no_grad():
        out = network(torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(t)).sample
    return out.permute(0, 2, 3, 1)


def distance(ours, theirs):
    """The largest relative error of an image."""
    axes = (1, 2, 3)
    theirs = np.asarray(theirs)
    error = np.sqrt(np.square(ours - theirs).sum(axes) / np.square(theirs).sum(axes))
    return error.max()


@pytest.mark.parametrize('name', LAYOUTS)
def test_networks_are_equal(name):
    network = their_network(**LAYOUTS[name])
    x, t = inputs(LAYOUTS[name], t=[0, 1, 37, 999])
    theirs = call(network, x, t)
    assert theirs.std() > 0.1
    graph, params = our_network(network, **LAYOUTS[name])
    assert distance(our_output(graph, params, x, t), theirs) < 1e-5

    back = to_tensors(params, folders.names)
    assert back.keys() == network.state_dict().keys()
    for tensor, array in back.items():
        np.testing.assert_array_equal(array, network.state_dict()[tensor])
    # A network that hears levels 1 … T is exported so that it hears their timesteps, and says the same.
    levels = np.array([1, 2, 38, 1000])
    heard = params | {'time1': params['time1'] | {'kernel': advance(params['time1']['kernel'])}}
    network.load_state_dict({name: torch.as_tensor(array) for name, array in to_tensors(heard, folders.names).items()})
    said = our_output(graph, params, x, levels)
    assert distance(said, call(network, x, levels - 1)) < 1e-5
    assert distance(said, theirs) > 1e-4


def test_the_full_network_of_cifar10():
    network = their_network(**FULL, groups=32)
    assert network.num_parameters() == 35_746_307
    x, t = inputs(FULL, t=[500])
    ours = our_output(*our_network(network, **FULL, groups=32), x, t)
    assert distance(ours, call(network, x, t)) < 1e-5


def test_each_setting_of_their_network_is_heard():
    """The comparison would notice each of the ways in which others' U-Nets differ (FIELD §2.10)."""
    layout = LAYOUTS['attention']
    x, t = inputs(layout, t=[3, 700])
    ours = our_output(*our_network(their_network(**layout), **layout), x, t)
    for change in (
        dict(downsample_padding=1),
        dict(flip_sin_to_cos=True),
        dict(freq_shift=0),
        dict(norm_eps=1e-5),
        dict(attention_head_dim=8),
        dict(act_fn='gelu'),
        dict(mid_block_scale_factor=1.1),
    ):
        assert distance(ours, call(their_network(**layout, **change), x, t)) > 1e-4, change


# ── Trajectories ─────────────────────────────────────────────────────────────────────────────────────────────────────


def keys():
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(N))


@functools.cache
def noises(shape=SHAPE):
    """What the sampler draws at each level, (T+1, N, *shape); its entry T is x_T."""

    def draw(level):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), shape))(keys())

    return np.array(jit(jax.vmap(draw))(jnp.arange(T + 1)))


def toy(xp, x, t):
    """A noise prediction with which some x̂_0 leave [−1, 1], and others do not; xp: jnp or torch, t: our level."""
    return x * xp.tanh(t / 200) + 0.05 * xp.sin(5 * x + t)


def wave(xp, x, t):
    """The same for the other kinds of prediction."""
    return 1.3 * xp.sin(2 * x + t / 100)


def ours(levels, *, net=toy, kind='eps', **how):
    return sample(lambda x, t: net(jnp, x, t[0]), SHAPE, levels, kind=kind, **how)


def sample(net, shape, levels, **how):
    """Our images, jitted."""
    program = jit(lambda keys: sampler.sample(keys, SCH, net, shape=shape, timesteps=levels, **how))
    return np.asarray(program(keys()))


def theirs(scheduler, num_steps, monkeypatch, *, net=toy, shape=SHAPE, last_noise=False, steps_to=None, **how):
    """The chain of diffusers' pipelines, with our x_T and the noises that we draw for the levels it steps to."""
    levels = their_levels(scheduler, num_steps)
    x = torch.from_numpy(noises(shape)[levels[0]])
    for t, s in zip(levels, [*levels[1:], 0] if steps_to is None else steps_to, strict=True):
        output = net(torch, x, torch.tensor(t))
        z = torch.from_numpy(noises(shape)[s]) * (s > 0 or last_noise)
        for name in ('ddim', 'ddpm'):
            monkeypatch.setattr(f'diffusers.schedulers.scheduling_{name}.randn_tensor', lambda *_, z=z, **__: z)
        x = scheduler.step(output, torch.tensor(t - 1), x, **how).prev_sample
    return x.numpy()


def ddim(spacing, clip, **change):
    return diffusers.DDIMScheduler(T, timestep_spacing=spacing, clip_sample=clip, set_alpha_to_one=True, **change)


def ddpm(spacing, clip, variance='small', **change):
    variance_type = 'learned_range' if variance == 'learned' else f'fixed_{variance}'
    return diffusers.DDPMScheduler(T, timestep_spacing=spacing, clip_sample=clip, variance_type=variance_type, **change)


def assert_equal(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.all(np.isfinite(theirs)) and theirs.std() > 0.1


# All spacings are the same at 1000 steps (test_levels).


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    'num_steps, spacing', [(10, 'leading'), (10, 'trailing'), (50, 'leading'), (50, 'trailing'), (T, 'linspace')]
)
def test_ddim(num_steps, spacing, eta, clip, monkeypatch):
    levels = schedule.timesteps(T, num_steps, spacing)
    images = theirs(ddim(spacing, clip), num_steps, monkeypatch, eta=eta, use_clipped_model_output=clip)
    assert_equal(ours(levels, eta=eta, clip=clip), images)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('variance', ['small', 'large'])
@pytest.mark.parametrize(
    'num_steps, spacing',
    [(n, spacing) for n in (10, 50) for spacing in ('leading', 'trailing', 'linspace')] + [(T, 'leading')],
)
def test_ddpm(num_steps, spacing, variance, clip, monkeypatch):
    """With no noise on the last step: see test_their_ddpm_adds_noise_on_the_last_step."""
    levels = schedule.timesteps(T, num_steps, spacing)
    images = theirs(ddpm(spacing, clip, variance), num_steps, monkeypatch)
    assert_equal(ours(levels, eta=1.0, variance=variance, clip=clip), images)


@pytest.mark.parametrize('kind, prediction_type', [('x0', 'sample'), ('v', 'v_prediction')])
@pytest.mark.parametrize('clip', [True, False])
def test_other_predictions(kind, prediction_type, clip, monkeypatch):
    levels = schedule.timesteps(T, 10, 'leading')
    of_kind = dict(net=wave, kind=kind)
    scheduler = ddim('leading', clip, prediction_type=prediction_type)
    images = theirs(scheduler, 10, monkeypatch, net=wave, eta=0.3, use_clipped_model_output=clip)
    assert_equal(ours(levels, **of_kind, eta=0.3, clip=clip), images)
    scheduler = ddpm('leading', clip, 'large', prediction_type=prediction_type)
    images = theirs(scheduler, 10, monkeypatch, net=wave)
    assert_equal(ours(levels, **of_kind, eta=1.0, variance='large', clip=clip), images)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('num_steps, spacing', [(10, 'leading'), (50, 'linspace'), (T, 'leading')])
def test_a_learned_variance(num_steps, spacing, clip, monkeypatch):
    """Their networks have the channels first, so that v follows the output along axis 1; ours along the last axis."""
    levels = schedule.timesteps(T, num_steps, spacing)

    def learned(xp, x, t):
        return toy(xp, x, t), 1.5 * xp.sin(3 * x + t)

    def theirs_of(_, x, t):
        return torch.cat(learned(torch, x, t), dim=1)

    def ours_of(x, t):
        return jnp.concatenate(learned(jnp, x, t[0]), axis=-1)

    images = sample(ours_of, SHAPE, levels, kind='eps', eta=1.0, variance='learned', clip=clip)
    assert_equal(images, theirs(ddpm(spacing, clip, 'learned'), num_steps, monkeypatch, net=theirs_of))


def test_trajectories_of_equal_networks(monkeypatch):
    """A network of theirs hears their timestep, one less than our level."""
    layout = LAYOUTS['plain']
    network, shape = their_network(**layout), (8, 8, 1)
    net = nnx.merge(*our_network(network, **layout))
    for scheduler, how, our_how in (
        (ddim('leading', True), dict(eta=0.3, use_clipped_model_output=True), dict(eta=0.3)),
        (ddpm('leading', True, 'large'), {}, dict(eta=1.0, variance='large')),
    ):
        levels = schedule.timesteps(T, 10, 'leading')
        images = sample(lambda x, t: net(x, t - 1), shape, levels, kind='eps', **our_how)
        their_images = theirs(
            scheduler, 10, monkeypatch, net=lambda _, x, t: call(network, x, t - 1), shape=shape, **how
        )
        assert_equal(images, their_images)


# ── Where diffusers errs: our default differs, and compat agrees ─────────────────────────────────────────────────────


def as_they_do(compat_mode, num_steps, spacing, eta, clip, variance='small'):
    """Our images with a compat mode, the levels that its steps lead to, and our images by default."""
    how = compat.resolve(compat_mode, T, num_steps=num_steps, spacing=spacing, eta=eta, variance=variance, clip=clip)
    assert how.pop('num_steps') == num_steps and how.pop('spacing') == spacing
    levels = how.pop('timesteps')
    default = ours(schedule.timesteps(T, num_steps, spacing), eta=eta, variance=variance, clip=clip)
    return ours(levels, **how), levels[:, 1] if levels.ndim == 2 else levels[1:], default


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    'num_steps, spacing',
    [
        *((n, spacing) for n in (10, 50) for spacing in ('leading', 'trailing', 'linspace')),
        *((n, spacing) for n in (7, 30) for spacing in ('leading', 'trailing')),
        (T, 'leading'),
    ],
)
def test_compat_with_their_ddim(num_steps, spacing, eta, clip, monkeypatch):
    """As it is called by default: it leaves ε̂ as it is where x̂_0 is clipped (FIELD §2.6), and always steps down by
    ⌊T/S⌋, even to levels that it does not visit next, or above level 0 at the end (FIELD §2.5)."""
    images, steps_to, default = as_they_do('diffusers-ddim', num_steps, spacing, eta, clip)
    assert_equal(images, theirs(ddim(spacing, clip), num_steps, monkeypatch, eta=eta, steps_to=steps_to))
    if eta < 1:
        np.testing.assert_array_equal(images, as_they_do('diffusers', num_steps, spacing, eta, clip)[0])
    follows = np.array_equal(steps_to, schedule.timesteps(T, num_steps, spacing)[1:])
    assert follows == (spacing == 'leading' or (spacing == 'trailing' and T % num_steps == 0))
    assert (steps_to[-1] > 0) == (spacing == 'trailing' and T % num_steps > 0 and num_steps == 7)
    # At 1000 steps clipping is rare enough for both ways to agree.
    if not follows or (clip and num_steps < T):
        assert np.abs(default - images).max() > 3e-3
    elif not clip:
        assert_equal(default, images)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('variance', ['small', 'large'])
@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize('num_steps', [10, 50])
def test_compat_with_their_ddpm(num_steps, spacing, variance, clip, monkeypatch):
    """It adds noise on the last step of 'trailing' chains, whose last timestep is not 0: √β of that long step with
    'fixed_large', all but none with 'fixed_small'."""
    images, steps_to, default = as_they_do('diffusers', num_steps, spacing, 1.0, clip, variance)
    scheduler = ddpm(spacing, clip, variance)
    assert_equal(images, theirs(scheduler, num_steps, monkeypatch, steps_to=steps_to, last_noise=True))
    if spacing == 'trailing' and variance == 'large':
        assert np.abs(default - images).max() > 0.1
    else:
        np.testing.assert_array_equal(default, images)


@pytest.mark.parametrize('num_steps', [61, 103])
def test_trailing_steps_from_a_level_that_is_none_are_not_followed(num_steps):
    assert their_levels(ddim('trailing', True), num_steps)[-1] == 0  # timestep −1
    with pytest.raises(ValueError, match='timestep −1'):
        compat.resolve('diffusers', T, num_steps=num_steps, spacing='trailing', eta=0.0, variance='small', clip=True)
