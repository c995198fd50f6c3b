"""PyTorch and diffusers do the same work as ours when they are timed."""

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.peers import TASKS, Task, theirs

torch = pytest.importorskip('torch')
pytest.importorskip('diffusers')
pytestmark = pytest.mark.peers


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_the_compiled_sampler_draws_the_same_images_as_diffusers(eta, monkeypatch):
    """Without the compiler, which is PyTorch's to test."""
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    drawn = []
    for compiled in (False, True):
        torch.manual_seed(0)
        sample, finish = theirs(Task('digits', 4, num_steps=10, eta=eta), compiled)
        torch.manual_seed(1)
        drawn.append(sample().int().numpy())
        finish()
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].std() > 30


def test_the_networks_agree():
    found = gpu.outputs(TASKS['rehearsal'][0])
    np.testing.assert_allclose(found['diffusers'], found['CPU'], atol=1e-4 * np.abs(found['CPU']).max())


def test_a_network_that_differs_is_an_error(monkeypatch):
    found = dict.fromkeys(('CPU', 'float32', 'bfloat16'), np.ones(4)) | {'diffusers': np.array([1, 1, 1, 1.1])}
    monkeypatch.setattr(gpu, 'outputs', lambda task: found)
    monkeypatch.setattr(gpu, 'losses', lambda *_: np.ones(2))
    with pytest.raises(ValueError, match=r'differ from those of the CPU: diffusers by 0\.05'):
        gpu.check(TASKS['rehearsal'][0], 2)
