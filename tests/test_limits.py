"""A run accepts any value of any key, or refuses it with a message that names the key, before it reads data."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion import build, compat, data, gaussian, limits, loss, sampler, schedule, workdir
from diffusion.configs import default
from diffusion.data.pictures import CROPS
from diffusion.modes import likelihood, sample, train
from diffusion.networks import IMPLEMENTATIONS, NETWORKS
from diffusion.util import RunError
from tests.runs import quick, tiny

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
MODES = {'sample': sample, 'likelihood': likelihood}
TABLES = {
    'data.crop': CROPS,
    'model.network': NETWORKS,
    'model.implementation': IMPLEMENTATIONS,
    'model.kind': gaussian.KINDS,
    'schedule.name': schedule.SCHEDULES,
    'train.loss': loss.WEIGHTINGS,
    'sample.rule': sampler.RULES,
    'sample.variance': gaussian.VARIANCES,
    'likelihood.variance': gaussian.VARIANCES,
    'sample.spacing': schedule.SPACINGS,
    'sample.compat': compat.COMPAT,
}


class Reached(Exception):  # noqa: N818
    """Every check has passed, and the work would begin."""


def begins(*args, **kwargs):
    raise Reached


@pytest.mark.slow
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FLAT)), st.data())
def test_any_value_is_accepted_or_refused_by_its_key(tmp_path_factory, key, drawn):
    value = drawn.draw(VALUES[type(FLAT[key])])
    about_network = key.startswith(('model.', 'data.'))
    config = (tiny if about_network else quick)({'sample.num_steps': 4})
    config.update_from_flattened_dict({key: value})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, 'load_images', begins)
        patch.setattr(build.data, 'open_pictures', begins)
        patch.setattr(workdir, 'load_params', lambda *_: (1, {}))
        patch.setattr(sample, 'make_sampler', begins)
        patch.setattr(data, 'survey', begins)
        folder = tmp_path_factory.mktemp('run')
        patch.chdir(tmp_path_factory.mktemp('elsewhere'))  # where a path such as 'quad' leads
        with pytest.raises((RunError, Reached)) as found:
            MODES.get(key.partition('.')[0], train).run(config, str(folder))
    if found.type is RunError:
        part, _, name = key.partition('.')
        assert part in str(found.value) and name in str(found.value), str(found.value)
        assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [('schedule.T', 100_001, '1 to 100000: float32 has'), ('compile_cache', 'workdir', "a folder, with a '/'")],
)
def test_values_that_would_fail_silently_are_refused(key, value, words):
    config = tiny()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(RunError, match=f'config.{key} is {value!r}, but must be {words}'):
        workdir.check(config)


def test_the_largest_number_of_levels_keeps_their_variances():
    """β_t of the schedule, from sums, against the β it was made from."""
    config = tiny({'schedule.T': 100_000, 'schedule.beta_start': 1e-6, 'schedule.beta_end': 2e-4})
    workdir.check(config)
    t = np.arange(1, 100_001)
    beta = build.make_schedule(config.schedule).beta(t - 1, t)
    np.testing.assert_allclose(beta, np.linspace(1e-6, 2e-4, 100_000), rtol=4e-7)


@pytest.mark.parametrize(
    ('limit', 'within', 'beyond'),
    [
        (limits.Integers(1, 5), (1, 5), (0, 6, 1.0)),
        (limits.Reals(0, 1), (0, 1), (-1e-9, 1.001, math.nan, '1')),
        (limits.Reals(0, 1, '[)'), (0, 0.999), (1, -1e-9)),
        (limits.Reals(0, ends='()'), (1e-9, 1e30), (0, math.inf)),
        (limits.Interval(), ((), (0, 1), (0.3, 3)), ((1, 1), (2, 1), (-1, 1), (1,), (0, math.inf))),
        (limits.NumbersOr('all'), ('all', '0', '[0, 3]'), ('', 'none', '-1', '1.5')),
        (limits.SomeOf('a', 'b'), ((), ('b', 'a')), (('a', 'a'), ('c',), 'a')),
    ],
)
def test_the_ends_of_limits(limit, within, beyond):
    assert all(map(limit.accepts, within)) and not any(map(limit.accepts, beyond))


@pytest.mark.parametrize('key', ['model.dropout', 'train.label_dropout', 'train.ema_decay'])
def test_what_would_leave_nothing_to_learn_is_beyond_the_limit(key):
    assert limits.LIMITS[key].accepts(0.999) and not limits.LIMITS[key].accepts(1.0)


def test_every_number_has_a_limit():
    for key, value in FLAT.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert key in limits.LIMITS, key
    assert set(limits.LIMITS) <= set(FLAT)


def test_the_defaults_are_within_their_limits():
    workdir.check(default.get_config())


@pytest.mark.parametrize('key', TABLES)
def test_an_entry_that_is_added_to_a_table_becomes_acceptable(key, monkeypatch):
    """It is refused before, by a message that lists the keys of the table; every other key is accepted."""
    config = default.get_config()
    for name in TABLES[key]:
        config.update_from_flattened_dict({key: name})
        workdir.check(config)
    config.update_from_flattened_dict({key: 'mine'})
    with pytest.raises(RunError) as error:
        workdir.check(config)
    assert str(error.value).startswith(f"config.{key} is 'mine', but must be one of ")
    for name in TABLES[key]:
        assert repr(name) in str(error.value)
    monkeypatch.setitem(TABLES[key], 'mine', None)
    workdir.check(config)
