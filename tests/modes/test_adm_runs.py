"""A tiny network of OpenAI's is trained and drawn from like any other, by the implementation for the devices."""

import json

import numpy as np
import pytest

from diffusion.modes import sample, train
from tests.runs import checkpoint, tiny

ADM = {
    'model.network': 'adm',
    'model.num_blocks': 1,
    'model.resblock_updown': True,
    'model.multipliers': (1, 1),
    'model.num_heads': 2,
    'model.variance': 'learned',
    'data.labels': True,
    'train.label_dropout': 0.5,
    'train.loss': 'hybrid',
    'train.num_steps': 2,
    'sample.num_images': 2,
    'sample.num_steps': 2,
    'sample.guidance': 2.0,
    'sample.metrics': (),
}


@pytest.mark.slow
def test_it_trains_and_draws_by_class(tmp_path):
    assert train.run(tiny(ADM), str(tmp_path)) == 0
    arrays = checkpoint(tmp_path, 2)
    assert arrays["params['mid1']['time']['kernel']"].shape == (32, 16)  # scale and shift
    assert arrays["params['conv_out']['kernel']"].shape == (3, 3, 8, 2)  # one output for the mean, one for the variance
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert sample.run(tiny(ADM), str(tmp_path)) == 0
    (file,) = tmp_path.glob('samples/*guidance2*/samples.npz')
    record = json.loads(file.with_name('record.json').read_text())
    assert record['model']['network'] == 'adm' and record['implementation'] == 'cpu'
    with np.load(file) as drawn:
        assert drawn['arr_0'].shape == (2, 8, 8, 1) and drawn['arr_1'].tolist() == [0, 1]
