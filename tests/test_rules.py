"""Any value of any key runs, or is refused by a message that names the key, before data is read."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import default
from diffusion import evaluate, experiment, generate, rules, train
from diffusion.experiment import RunError
from tests.test_train import tiny

FLAT = {
    f'{part}.{key}' if isinstance(value, dict) else part: inner
    for part, value in default.get_config().to_dict().items()
    for key, inner in (value.items() if isinstance(value, dict) else [(None, value)])
}
INTEGERS = st.sampled_from([-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 4, 8, 17, 64, 1000, 2**31 - 1, 2**31, 2**63])
FLOATS = st.sampled_from([-math.inf, -1e30, -1.0, -1e-9, 0.0, 1e-300, 0.3, 0.999, 1.0, 1.5, 1e30, math.inf, math.nan])
WORDS = ['', 'x', 'großes Bild', '../..', 'eps', 'v', 'small', 'large', 'ema', 'raw', 'cosine', 'jsd', 'vlb', 'quad']
VALUES = {
    bool: st.booleans(),
    int: INTEGERS | st.integers(-10, 100),
    float: FLOATS | st.floats(),
    str: st.sampled_from(WORDS) | st.text(max_size=8),
    tuple: st.lists(INTEGERS | st.sampled_from(['a', 0.5, None, ()]), max_size=3).map(tuple),
}
MODES = {'sample': generate, 'likelihood': evaluate}


class Reached(Exception):  # noqa: N818
    """Everything was found good, and the work would begin."""


def begins(*args, **kwargs):
    raise Reached


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FLAT)), st.data())
def test_any_value_runs_or_is_refused_by_its_key(tmp_path_factory, key, drawn):
    value = drawn.draw(VALUES[type(FLAT[key])])
    config = tiny({'sample.num_steps': 4})
    config.update_from_flattened_dict({key: value})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, 'load_images', begins)
        patch.setattr(experiment, 'load_params', lambda *_: (1, {}))
        patch.setattr(generate, 'make_sampler', begins)
        patch.setattr(experiment.data, 'survey', begins)
        folder = tmp_path_factory.mktemp('run')
        with pytest.raises((RunError, Reached)) as found:
            MODES.get(key.partition('.')[0], train).run(config, str(folder))
    if found.type is RunError:
        part, _, name = key.partition('.')
        assert part in str(found.value) and name in str(found.value), str(found.value)
        assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [('schedule.T', 10_001, 'from 1 to 10000: β .* float32'), ('compile_cache', '', "a folder, 'workdir' or 'off'")],
)
def test_what_would_go_wrong_silently_is_refused(key, value, words):
    config = tiny()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(RunError, match=f'config.{key} is {value!r}, but must be {words}'):
        experiment.check(config)


def test_as_many_levels_as_are_allowed_keep_their_variances():
    """β_t as the schedule answers it, from sums in float32, against the β that went into it."""
    config = tiny({'schedule.T': 10_000, 'schedule.beta_start': 1e-5, 'schedule.beta_end': 2e-3})
    experiment.check(config)
    t = np.arange(1, 10_001)
    beta = experiment.make_schedule(config.schedule).beta(t - 1, t)
    np.testing.assert_allclose(beta, np.linspace(1e-5, 2e-3, 10_000), rtol=1e-3)


def test_every_number_has_a_rule():
    for key, value in FLAT.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert key in rules.RULES, key
    assert set(rules.RULES) <= set(FLAT)


def test_what_is_allowed_is_what_there_is():
    """The words of the rules are those of the dicts and tuples of the code."""
    from diffusion import compat, gaussian, loss, schedule
    from diffusion.data.pictures import CROPS

    for key, known in {
        'data.crop': CROPS,
        'model.kind': gaussian.KINDS,
        'train.loss': loss.WEIGHTINGS,
        'sample.spacing': schedule.SPACINGS,
        'sample.compat': compat.MODES,
    }.items():
        good, words = rules.RULES[key]
        assert all(good(name) for name in known), key
        assert words == f'one of {", ".join(map(repr, known))}' or set(words.split("'")[1::2]) == set(known)
