"""The transformer: its counts and its equations from the paper, its symmetry, its runs, and what is refused."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion import workdir
from diffusion.modes import export, likelihood, sample, train
from diffusion.networks import dit
from diffusion.networks.dit import Block, DiT
from diffusion.util import RunError
from tests.networks.test_unet import QUICK, count, random_state
from tests.runs import checkpoint, tiny

jit = functools.partial(jax.jit, compiler_options=QUICK)
SMALL = dict(
    image_size=6,
    image_channels=2,
    out_channels=3,
    channels=8,
    head_channels=4,
    patch_size=2,
    depth=2,
    num_classes=3,
    dropout=0.0,
    dtype=jnp.float32,
)
X = np.random.default_rng(1).normal(size=(4, 6, 6, 2)).astype(np.float32)
T, LABELS = np.array([3, 700, 1, 40]), np.array([0, 2, -1, 1])
SHUFFLED = np.random.default_rng(2).permutation(9)


def make(**change):
    return nnx.eval_shape(lambda: DiT(**SMALL | change, rngs=nnx.Rngs(0)))


GRAPH, ABSTRACT = nnx.split(make())
STATE = random_state(ABSTRACT)


@pytest.fixture(scope='module')
def evaluate():
    """A function of images, levels, labels, and the order of the position embeddings; compiled once."""
    graphs = {'plain': GRAPH, 'remat': nnx.split(make(remat=True))[0]}

    @jit
    def run(x, t, labels, order):
        own = dit.position_embedding

        def loss(state, graph):
            output = nnx.merge(graph, state)(x, t, labels)
            return (output**2).sum(), output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dit, 'position_embedding', lambda side, dim: own(side, dim)[order])
            found = {name: jax.grad(loss, has_aux=True)(STATE, graph) for name, graph in graphs.items()}
            return {
                'output': found['plain'][1],
                'without labels': nnx.merge(GRAPH, STATE)(x, t),
                'gradients': {name: gradient for name, (gradient, _) in found.items()},
            }

    return lambda x=X, t=T, labels=LABELS, order=np.arange(9): jax.device_get(run(x, t, labels, order))


# Table 1 of the paper, for latents 32×32×4 with learned variances and 1,000 classes.
@pytest.mark.parametrize('d, depth, heads, millions', [(384, 12, 6, 33), (768, 12, 12, 130)])
def test_parameters_of_the_paper(d, depth, heads, millions):
    latents = dict(image_size=32, image_channels=4, out_channels=8, num_classes=1000)
    network = make(**latents, channels=d, depth=depth, head_channels=d // heads)
    attention, mlp, modulation = 4 * d**2 + 4 * d, 8 * d**2 + 5 * d, 6 * d**2 + 6 * d
    embeddings = (16 * d + d) + (256 * d + d + d**2 + d) + 1001 * d
    last = (2 * d**2 + 2 * d) + (32 * d + 32)
    assert count(network) == depth * (attention + mlp + modulation) + embeddings + last
    assert round(count(network) / 1e6) == millions


def test_an_initial_network_returns_zero_and_its_blocks_are_the_identity():
    @jit
    def fresh(key):
        network = DiT(**SMALL | dict(depth=1), rngs=nnx.Rngs(key))
        tokens, emb = jax.random.normal(key, (2, 9, 8)), jax.random.normal(key, (2, 8))
        return network(X, T, LABELS), network.blocks[0](tokens, emb), tokens

    output, after, before = fresh(jax.random.key(0, impl='unsafe_rbg'))  # quick to compile
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_array_equal(after, before)
    assert np.ptp(before) > 1


def patches(x, size=2):
    """(B, N, size, size, C), one patch after the other."""
    rows = [x[:, i : i + size, j : j + size] for i in range(0, x.shape[1], size) for j in range(0, x.shape[2], size)]
    return np.stack(rows, axis=1)


def shuffled(x):
    """The image whose patch n is patch SHUFFLED[n] of x."""
    cut = patches(np.asarray(x))[:, SHUFFLED]
    return np.concatenate([np.concatenate(list(cut[:, 3 * i : 3 * i + 3].swapaxes(0, 1)), axis=2) for i in range(3)], 1)


@pytest.mark.slow
def test_patches_are_a_set_but_for_their_position_embeddings(evaluate):
    """Shuffled together with these, they give the shuffled output; shuffled alone, another."""
    output = evaluate()['output']
    np.testing.assert_allclose(evaluate(order=SHUFFLED, x=shuffled(X))['output'], shuffled(output), atol=1e-5)
    assert np.abs(evaluate(x=shuffled(X))['output'] - shuffled(output)).max() > 1e-2


def test_the_output_depends_on_image_level_and_class_and_on_no_other_image(evaluate):
    output = evaluate()['output']
    assert output.shape == (4, 6, 6, 3) and output.dtype == jnp.float32
    first = np.eye(4, dtype=np.int32)[0]
    for change in (dict(x=np.float32(X + first[:, None, None, None])), dict(t=T + first), dict(labels=LABELS + first)):
        other = evaluate(**change)['output']
        assert np.abs(other - output)[0].max() > 1e-3
        np.testing.assert_allclose(other[1:], output[1:], atol=1e-6)


def test_no_labels_are_those_of_no_class(evaluate):
    found = evaluate(labels=np.full(4, -1))
    np.testing.assert_allclose(found['output'], found['without labels'], atol=1e-6)
    assert np.abs(evaluate()['output'] - found['output'])[[0, 1, 3]].max((1, 2, 3)).min() > 1e-3


def test_every_parameter_has_a_gradient_and_remat_the_same(evaluate):
    gradients = evaluate()['gradients']
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients['plain']), jax.tree.leaves(gradients['remat']), strict=True
    ):
        one = np.asarray(one)
        # The bias of the keys adds the same to all logits of a query, which softmax ignores.
        effective = np.delete(one, slice(8, 16)) if "'qkv'" in str(path) and one.ndim == 1 else one
        assert np.abs(effective).min() > 1e-6, path
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=str(path))


def test_remat_keeps_less():
    def kept(remat):
        """Elements of what the backward pass needs, in images of the input's size."""
        graph = nnx.split(make(remat=remat))[0]
        run = lambda state: (nnx.merge(graph, state)(X, T) ** 2).sum()  # noqa: E731
        vjp = jax.eval_shape(lambda state: jax.vjp(run, state)[1], ABSTRACT)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp)) / X.size

    assert kept(True) < 0.5 * kept(False)


def test_the_output_is_that_of_the_papers_equations(evaluate):
    """In float64: DiT, §3 and figure 3, with the position embedding of MAE."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(STATE))
    d, heads, size, side = 8, 2, 2, 3

    def linear(layer, x):
        return x @ layer['kernel'] + layer.get('bias', 0)

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def waves(position, dim):
        """sin and cos of position·ω with ω = 10000^(−2i/dim)."""
        angles = position / 10_000 ** (np.arange(dim // 2) / (dim // 2))
        return np.sin(angles), np.cos(angles)

    def attention(layer, x):
        query, key, value = np.split(linear(layer['qkv'], x), 3, axis=1)
        parts = []
        for head in range(heads):
            q, k, v = (values[:, head * d // heads : (head + 1) * d // heads] for values in (query, key, value))
            weights = np.exp(q @ k.T / math.sqrt(d // heads))
            parts.append(weights / weights.sum(1, keepdims=True) @ v)
        return linear(layer['out'], np.concatenate(parts, axis=1))

    positions = np.array([[*waves(j, d // 2), *waves(i, d // 2)] for i in range(side) for j in range(side)])
    expected = np.zeros((4, 6, 6, 3))
    for n in range(4):
        sin, cos = waves(T[n], 256)
        c = linear(params['time2'], silu(linear(params['time1'], np.concatenate([cos, sin]))))
        c += params['label']['kernel'][LABELS[n]]
        tokens = np.stack([patch.ravel() for patch in patches(X[n : n + 1].astype(np.float64))[0]])
        x = linear(params['patches_in'], tokens) + positions.reshape(side**2, d)
        for _, layer in sorted(params['blocks'].items()):
            shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(layer['modulation'], silu(c)), 6)
            x = x + gate1 * attention(layer, norm(x) * (1 + scale1) + shift1)
            hidden = gelu(linear(layer['mlp1'], norm(x) * (1 + scale2) + shift2))
            x = x + gate2 * linear(layer['mlp2'], hidden)
        shift, scale = np.split(linear(params['modulation_out'], silu(c)), 2)
        for k, patch in enumerate(linear(params['patches_out'], norm(x) * (1 + scale) + shift)):
            i, j = k // side * size, k % side * size
            expected[n, i : i + size, j : j + size] = patch.reshape(size, size, 3)
    np.testing.assert_allclose(evaluate()['output'], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_and_dropout(evaluate):
    """Near float32; and each image, call and block has a mask of its own, unless there is none."""
    half = nnx.split(make(dtype=jnp.bfloat16))[0]
    dropped = nnx.split(make(dropout=0.5))[0]

    @jit
    def run(seed):
        rngs = nnx.Rngs(dropout=jax.random.key(seed))
        x, t, labels = (jnp.repeat(batch[:1], 4, axis=0) for batch in (X, T, LABELS))
        masked = nnx.merge(dropped, STATE)(x, t, labels, deterministic=False, rngs=rngs)
        return nnx.merge(half, STATE)(X, T, LABELS), masked

    (low, first), (_, again), (_, other) = (run(seed) for seed in (0, 0, 1))
    expected = evaluate()['output']
    assert low.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(low - expected) / np.linalg.norm(expected) < 0.03
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first[0] - first[1]).max() > 1e-3


def test_each_block_has_a_dropout_key_of_its_own(monkeypatch):
    keys = []
    monkeypatch.setattr(Block, '__call__', lambda block, x, emb, key: keys.append(jax.random.key_data(key)) or x)

    @jit
    def call(key):
        nnx.merge(GRAPH, STATE)(X, T, deterministic=False, rngs=nnx.Rngs(dropout=key))
        return jnp.stack(keys)

    assert len(np.unique(call(jax.random.key(0)), axis=0)) == len(keys) == 2


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(image_size=7), r'image_size is 7, which is not divisible by patch_size = 2'),
        (dict(patch_size=12), r'image_size is 6, .* patch_size = 12'),
        (dict(patch_size=0), 'patch_size is 0'),
        (dict(depth=0), 'depth is 0'),
        (dict(channels=6), 'multiple of 4'),
        (dict(head_channels=3), r'channels = 8 is not divisible by head_channels = 3'),
        (dict(dropout=1.0), 'dropout'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


RUN = {
    'model.network': 'dit',
    'model.kind': 'x0',
    'model.patch_size': 4,
    'model.depth': 1,
    'model.head_channels': 4,
    'model.num_classes': 10,
    'data.labels': True,
    'train.label_dropout': 0.5,
    'train.num_steps': 2,
    'sample.num_images': 2,
    'sample.num_steps': 2,
    'sample.guidance': 2.0,
    'sample.metrics': (),
    'likelihood.quantities': ('posterior', 'flow'),
    'likelihood.num_images': 2,
    'likelihood.batch_size': 2,
    'likelihood.rtol': 1e-2,
    'likelihood.atol': 1e-2,
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of two steps."""
    path = tmp_path_factory.mktemp('run')
    assert train.run(tiny(RUN), str(path)) == 0
    return path


def test_it_trains_and_draws_by_class(trained):
    arrays = checkpoint(trained, 2)
    assert arrays["params['patches_in']['kernel']"].shape == (4 * 4, 8)
    assert np.abs(arrays["params['patches_out']['kernel']"]).max() > 0  # it began at zero
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert sample.run(tiny(RUN), str(trained)) == 0
    (file,) = trained.glob('samples/*guidance2*/samples.npz')
    with np.load(file) as drawn:
        assert drawn['arr_0'].shape == (2, 8, 8, 1) and drawn['arr_1'].tolist() == [0, 1]


def test_diffusers_has_no_such_network(trained):
    with pytest.raises(RunError, match=r"network is 'dit', which diffusers does not have.*format=arrays"):
        export.run(tiny(RUN), str(trained))


@pytest.mark.slow
def test_its_likelihood_in_both_ways(trained):
    """By the chain and by the flow, whose divergence is a derivative through the attention."""
    assert likelihood.run(tiny(RUN), str(trained)) == 0
    (file,) = trained.glob('likelihood/*/ledger.json')
    rows = json.loads(file.read_text())['rows']
    totals = [row['nats'] for row in rows if 'total' in row['quantity']]
    assert len(totals) >= 2 and np.isfinite(totals).all()


def test_a_network_for_it_is_not_chosen_from_the_pictures(tmp_path):
    with pytest.raises(RunError, match=r"config\.model\.channels is 0, .* but .*network is 'dit'"):
        workdir.resolve(tiny(RUN | {'model.channels': 0}), str(tmp_path))
