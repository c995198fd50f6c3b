"""--mode=export: what is refused, and the model card; tests/peers/test_interop.py loads exports with diffusers."""

import json
import os
import stat

import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path
from safetensors.numpy import load_file

from diffusion import gaussian
from diffusion.configs import workdir as configs_workdir
from diffusion.modes import export
from diffusion.networks.embedding import time_embedding
from diffusion.util import RunError
from tests.runs import make_run, quick, random_params, tiny


def run_of(path, config):
    """A workdir with random weights at step 1."""
    params = random_params(config, 1)
    return make_run(path, config, 1, params=params, ema=params)


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / 'run', tiny())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['', 'step1-ema/unet/diffusion_pytorch_model.safetensors', 'step1-ema/README.md'])
def test_a_folder_that_cannot_be_written_is_one_error(run, name):
    """A file stands where a folder is needed, or a folder where a file is needed."""
    (run / 'export' / name).mkdir(parents=True)
    if not name:
        (run / 'export').rmdir()
        (run / 'export').write_text('not a folder')
    with pytest.raises(RunError, match=r'/export/step1-ema cannot be written .*--workdir'):
        export.run(tiny(), str(run))


def test_the_timesteps_of_an_export_are_our_levels_less_one(run):
    """What its network embeds of t is what ours embeds of t + 1."""
    config = tiny()
    assert export.run(config, str(run)) == 0
    tensors = load_file(run / 'export' / 'step1-ema' / 'unet' / 'diffusion_pytorch_model.safetensors')
    theirs, ours = tensors['time_embedding.linear_1.weight'].T, random_params(config, 1)['time1']['kernel']
    how = len(ours), config.model.embedding_order, config.model.embedding_shift
    t = np.arange(config.schedule.T)
    np.testing.assert_allclose(time_embedding(t, *how) @ theirs, time_embedding(t + 1, *how) @ ours, atol=1e-5)


def test_the_card_does_not_tell_where_pictures_lie(tmp_path):
    """Although the config leaves open what they are, and config.json says more than a config."""
    pictures = tmp_path / 'private' / 'cats'
    pictures.mkdir(parents=True)
    run = run_of(
        tmp_path / 'run', tiny({'data.source': f'folder:{pictures}', 'data.cache_dir': str(tmp_path / 'private')})
    )
    images = {'count': 3, 'fingerprint': 'of cats', 'sha256': '0', 'channel_means': [1.0]}
    stored = json.loads((run / 'config.json').read_text()) | {'images': images}
    (run / 'config.json').write_text(json.dumps(stored))
    config = configs_workdir.get_config(str(run))
    config.data.image_size = 0
    assert export.run(config, str(run)) == 0
    card = (run / 'export' / 'step1-ema' / 'README.md').read_text()
    assert 'private' not in card and 'folder:cats' in card and '| data.image_size | 8 |' in card


def test_a_network_that_diffusers_cannot_express_is_refused(tmp_path):
    config = tiny({'model.multipliers': (2,)})
    run = run_of(tmp_path / 'run', config)
    with pytest.raises(RunError, match=r'config\.model: multipliers is \(2,\).*interop\.format=arrays'):
        export.run(config, str(run))
    assert not (run / 'export').exists()


def test_the_card_of_imported_weights_names_no_training(tmp_path):
    """The config's images and settings of training are not those by which another project trained them."""
    config = tiny({'interop.source': f'ddim:{tmp_path}/celeba.ckpt'})
    params = random_params(config, 1)
    run = make_run(tmp_path / 'run', config, 0, params=params, ema=params)
    assert export.run(config, str(run)) == 0
    card = (run / 'export' / 'step0-ema' / 'README.md').read_text()
    assert '# ddim:celeba.ckpt at 8×8, DDPM' in card and '| imported from | ddim:celeba.ckpt |' in card
    assert '| data.image_size | 8 |' in card and '| schedule.T | 4 |' in card
    assert 'digits' not in card and 'train.' not in card


def test_what_diffusers_cannot_sample_is_refused(run, monkeypatch):
    """A kind that a config has added, and a learned variance of a network that learns none."""
    with pytest.raises(RunError, match=r"config\.sample: variance is 'learned', but .* model\.variance='fixed'"):
        export.run(tiny({'sample.variance': 'learned'}), str(run))
    monkeypatch.setitem(gaussian.KINDS, 'score', gaussian.KINDS['eps'])
    other = run_of(run.parent / 'other', tiny({'model.kind': 'score'}))
    with pytest.raises(RunError, match=r"config\.model: kind is 'score', but diffusers .*interop\.format=arrays"):
        export.run(tiny({'model.kind': 'score'}), str(other))
    assert not (run / 'export').exists() and not (other / 'export').exists()


@pytest.mark.parametrize(
    'source', ['ddim:/private/model.ckpt', 'ddim:~/private/model.ckpt', 'ddim:../private/model.ckpt']
)
def test_a_file_that_is_gone_is_shown_without_its_folder(source):
    assert export.public(source) == 'ddim:model.ckpt'
    assert export.public('diffusers:google/ddpm-cifar10-32') == 'diffusers:google/ddpm-cifar10-32'  # an id of the hub


@pytest.mark.parametrize(('umask', 'mode'), [(0o022, 0o644), (0o007, 0o660)])
@pytest.mark.parametrize('layout', ['diffusers', 'arrays'])
def test_weights_have_the_permissions_of_new_files(run, layout, umask, mode):
    """Not those of safetensors, which lets only the owner read."""
    before = os.umask(umask)
    try:
        assert export.run(tiny({'interop.format': layout}), str(run)) == 0
    finally:
        os.umask(before)
    (weights,) = run.glob('export/**/*.safetensors')
    assert stat.S_IMODE(weights.stat().st_mode) == mode
    assert {path.suffix for path in weights.parent.iterdir()} == {'.json', '.safetensors'}  # nothing is left over


def test_any_network_is_exported_as_named_arrays(tmp_path):
    """Also one that this project does not have, without the folders of this machine."""
    config = quick({'interop.format': 'arrays', 'data.cache_dir': str(tmp_path / 'private')})
    params = random_params(config, 1)
    run = make_run(tmp_path / 'run', config, 1, params=params, ema=params)
    assert export.run(config, str(run)) == 0
    folder = run / 'export' / 'step1-ema-arrays'
    arrays = load_file(folder / 'params.safetensors')
    expected = {'.'.join(str(key.key) for key in path): leaf for path, leaf in tree_leaves_with_path(params)}
    assert arrays.keys() == expected.keys() and len(arrays) > 2
    assert all(np.array_equal(arrays[name], leaf) for name, leaf in expected.items())
    record = (folder / 'record.json').read_text()
    assert json.loads(record)['model.network'] == config.model.network and 'private' not in record


@pytest.mark.parametrize(
    ('spacing', 'words'),
    [
        ('leading', ''),
        ('trailing', ''),
        ('linspace', "With 'linspace', diffusers' DDIM"),
        ('quad', "'quad', is none of diffusers'"),
    ],
)
def test_the_card_says_where_the_pipelines_differ(spacing, words):
    note = export.spacing_note(spacing)
    assert words in note and bool(note) == bool(words)


def test_the_note_is_in_the_card(run):
    config = tiny({'sample.spacing': 'linspace'})
    assert export.run(config, str(run)) == 0
    assert export.spacing_note('linspace') in (run / 'export' / 'step1-ema' / 'README.md').read_text()
    config = tiny({'sample.spacing': 'leading'})
    assert export.run(config, str(run)) == 0
    assert '```\n\n## Record' in (run / 'export' / 'step1-ema' / 'README.md').read_text()
