"""OpenAI's network: outputs equal to those in PyTorch with the tensors of a checkpoint, and import of such files."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion import build, workdir
from diffusion.configs import workdir as configs_workdir
from diffusion.interop import openai
from diffusion.interop.tensors import to_params
from diffusion.modes import import_weights
from diffusion.networks import ADM, make_rngs
from tests.runs import tiny

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.peers

# ruff: noqa: E402 (after what may be missing)
from tests.peers.openai_network import Network, shapes

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # compiles in a third

LAYOUTS = {
    'improved, 64×64': dict(multipliers=(1, 2, 3, 4), num_blocks=1, attention=(2, 3), size=16, num_heads=4),
    'improved, LSUN': dict(
        multipliers=(1, 2, 2), num_blocks=2, attention=(2,), size=12, num_heads=1, scale_shift=False
    ),
    'improved, with classes': dict(multipliers=(1, 2), num_blocks=3, attention=(1,), size=8, num_heads=2, classes=7),
    'guided, 64×64': dict(
        multipliers=(1, 2, 3), num_blocks=1, attention=(0, 1, 2), size=8, head_channels=16, classes=5, updown=True,
        new_order=True,
    ),
    'guided, 128×128': dict(
        multipliers=(1, 1, 2), num_blocks=2, attention=(1, 2), size=12, num_heads=4, classes=3, updown=True
    ),
    'guided, unconditional': dict(
        multipliers=(1, 2), num_blocks=1, attention=(), size=8, head_channels=32, updown=True, out_channels=3
    ),
    'grey': dict(
        multipliers=(2, 1), num_blocks=2, attention=(0,), size=6, head_channels=8, image_channels=1, out_channels=2,
        updown=True, scale_shift=False,
    ),
    'one level': dict(
        multipliers=(2,), num_blocks=2, attention=(0,), size=5, head_channels=16, image_channels=1, out_channels=1,
        new_order=True,
    ),
}  # fmt: skip
OUR = ('num_heads', 'head_channels')


def checkpoint(seed=0, **layout):
    """A state dict in which every tensor has an effect."""
    draw = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes(channels=32, **layout).items():
        values = draw.standard_normal(shape, np.float32)
        if name == 'label_emb.weight':
            pass
        elif len(shape) > 1:
            values /= math.sqrt(math.prod(shape[1:]))
        else:
            values = values / 2 + (name.endswith('weight'))
        state[name] = torch.as_tensor(values)
    return state


def theirs(state, layout, **how):
    def heads(width):
        return width // layout['head_channels'] if 'head_channels' in layout else layout['num_heads']

    return Network(state, num_blocks=layout['num_blocks'], heads=heads, new_order=layout.get('new_order', False), **how)


def structure(layout):
    return {k: v for k, v in layout.items() if k not in ('size', 'new_order', *OUR)}


def inputs(layout, t):
    draw = np.random.default_rng(1)
    size, channels = layout['size'], layout.get('image_channels', 3)
    x = draw.standard_normal((len(t), size, size, channels), np.float32)
    labels = draw.integers(0, layout['classes'], len(t)).astype(np.int32) if layout.get('classes') else None
    return x, np.array(t), labels


def call(network, x, t, labels=None):
    with torch.no_grad():
        given = () if labels is None else (torch.as_tensor(labels).long(),)
        return network(torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(t), *given).permute(0, 2, 3, 1).numpy()


def distance(ours, others):
    return float(np.linalg.norm(ours - others) / np.linalg.norm(others))


@pytest.mark.parametrize('name', LAYOUTS)
def test_equal_outputs(name, tmp_path):
    """Of the network that the reader finds in a file, at their timesteps; every entry of a state dict is used."""
    layout = LAYOUTS[name]
    state = checkpoint(**structure(layout))
    torch.save(state, tmp_path / 'model.pt')
    asked = {key: layout[key] for key in OUR if key in layout}
    order = 'new' if layout.get('new_order') else 'legacy'
    found = openai.read(str(tmp_path / 'model.pt'), image_size=layout['size'], attention_order=order, **asked)
    model = found.settings['model']
    out_channels = found.settings['data']['channels'] * (1 + (model.pop('variance') == 'learned'))
    assert model['num_classes'] == layout.get('classes', 0)
    settings = {key: value for key, value in model.items() if key not in ('network', 'first_level')}
    graph, expected = nnx.split(
        nnx.eval_shape(
            lambda: ADM(
                image_size=layout['size'], image_channels=found.settings['data']['channels'], dropout=0.0,
                dtype=jnp.float32, rngs=make_rngs(default=0), out_channels=out_channels, **settings, **asked,
            )
        )
    )  # fmt: skip
    params = to_params(found.weights['params'], nnx.to_pure_dict(expected), found.names, 'model.pt')
    x, t, labels = inputs(layout, [0, 1, 37, 999])
    answer = call(theirs(state, layout), x, t, labels)
    given = () if labels is None else (labels,)
    ours = jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    assert distance(ours(params, x, t, *given), answer) < 1e-5 and answer.std() > 0.1
    if labels is not None:  # the row of no class is that of a network without an embedding of classes
        assert distance(ours(params, x, t), call(theirs(state, layout), x, t)) < 1e-5
        assert distance(ours(params, x, t, (labels + 1) % layout['classes']), answer) > 1e-2


COUNTS = {
    'guided-diffusion, 64×64': (
        dict(channels=192, multipliers=(1, 2, 3, 4), num_blocks=3, attention=(1, 2, 3), classes=1000, updown=True),
        295_904_454,
    ),
    'improved-diffusion, 64×64': (
        dict(channels=128, multipliers=(1, 2, 3, 4), num_blocks=3, attention=(2, 3)),
        121_063_942,
    ),
}


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_of_the_published_checkpoints(name):
    """As tests/networks/test_adm.py has them."""
    structure, count = COUNTS[name]
    assert sum(map(math.prod, shapes(**structure).values())) == count


# ── Import ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_becomes_a_workdir(tmp_path):
    """A conditional one with its steps rescaled, as PyTorch and as safetensors save it: outputs at level t are theirs
    at timestep t − 1, and the row of no class is not to be used."""
    layout = dict(multipliers=(1, 2), num_blocks=1, attention=(1,), size=8, head_channels=16, new_order=True)
    layout |= dict(image_channels=1, out_channels=1, classes=3, updown=True)
    state = checkpoint(**structure(layout))
    torch.save(state, tmp_path / 'model.pt')
    asked = {'model.head_channels': 16, 'interop.attention_order': 'new', 'schedule.T': 4000, 'model.level_scale': 0.25}
    asked |= {'schedule.beta_start': 1e-4, 'schedule.beta_end': 0.02}
    config = tiny(asked | {'interop.source': f'openai:{tmp_path / "model.pt"}'})
    assert import_weights.run(config, str(tmp_path / 'ours')) == 0
    stored = json.loads((tmp_path / 'ours' / 'config.json').read_text())
    assert stored['data']['labels'] and stored['model']['num_classes'] == 3 and stored['train']['label_dropout'] == 0
    config = configs_workdir.get_config(str(tmp_path / 'ours'))
    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(tmp_path / 'ours'), 'ema')
    x, t, labels = inputs(layout, [1, 2, 38, 4000])
    ours = jit(lambda x, t: exp.network.net(params, labels)(x, t))(x, t)
    assert distance(ours, call(theirs(state, layout, time_scale=0.25), x, t - 1, labels)) < 1e-5
