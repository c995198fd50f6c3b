"""PyTorch and diffusers do the same work as ours when they are timed."""

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.peers import Task, theirs

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
    assert gpu.check()['diffusers'] < 1e-4


def test_nothing_is_timed_if_the_networks_differ(monkeypatch):
    outputs = {'float32': np.ones(4), 'bfloat16': np.ones(4), 'diffusers': np.array([1, 1, 1, 1.1])}
    monkeypatch.setattr(gpu, 'outputs', lambda: outputs)
    with pytest.raises(ValueError, match=r'diffusers by 0\.05; nothing was measured'):
        gpu.check()
