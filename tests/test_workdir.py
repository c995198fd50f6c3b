"""The workdir: config.json and what it refuses, the lock, and the folder of compiled programs."""

import json

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from diffusion import autoconfig, build, workdir
from diffusion.configs import default, folder
from diffusion.util import RunError
from tests.runs import make_run, quick, random_params, saved

# What config.json is checked for.


def test_the_same_config_is_accepted_and_incidental_keys_may_differ(tmp_path):
    workdir.write_config(quick(), str(tmp_path))
    workdir.check_config(quick(), str(tmp_path))
    incidental = {
        'data.source': 'folder:/elsewhere',
        'data.cache': False,
        'data.placement': 'host',
        'model.implementation': 'plain',
        'model.dtype': 'bfloat16',
        'model.remat': True,
        'train.batch_size': 8,
        'sample.eta': 0.5,
        'seed': 1,
    }
    workdir.check_config(quick(incidental), str(tmp_path))


@pytest.mark.parametrize(
    ('key', 'value'),
    [('model.network', 'unet'), ('model.kind', 'v'), ('data.crop', 'center'), ('schedule.beta_end', 0.4)],
)
def test_another_identity_is_refused_by_its_key(tmp_path, key, value):
    workdir.write_config(quick(), str(tmp_path))
    part, _, name = key.partition('.')
    there = quick()[part][name]
    with pytest.raises(RunError) as error:
        workdir.check_config(quick({key: value}), str(tmp_path))
    lines = str(error.value).splitlines()
    assert lines[1:-1] == [f'    config.{key}: {there!r} there, {value!r} asked']
    assert str(tmp_path) in lines[0] and '--workdir' in lines[-1]


def test_a_run_from_before_a_key_existed_has_its_default(tmp_path):
    stored = quick().to_dict()
    del stored['model']['first_level'], stored['schedule']['offset']
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    workdir.check_config(quick(), str(tmp_path))
    with pytest.raises(RunError, match=r'config\.model\.first_level: 1 there, 0 asked'):
        workdir.check_config(quick({'model.first_level': 0}), str(tmp_path))


def test_a_run_on_other_images_is_refused(tmp_path):
    config = quick()
    images = build.load_images(config)
    workdir.write_config(config, str(tmp_path), images)
    workdir.check_config(config, str(tmp_path), images)
    others = build.load_images(config, 'test')
    with pytest.raises(RunError, match=r'the images: 1498, preprocessing \w+ there; 299, preprocessing \w+ in digits'):
        workdir.check_config(config, str(tmp_path), others)


def test_changes_of_training_are_recorded_and_printed(tmp_path, capsys):
    """Not before the first step, and those that change no parameter are recorded without a line."""
    workdir.write_config(quick(), str(tmp_path))
    workdir.write_config(quick({'train.learning_rate': 0.5}), str(tmp_path))
    assert 'changes' not in workdir.read_config(tmp_path) and capsys.readouterr().out == ''
    now = {'train.learning_rate': 0.25, 'train.log_every': 7, 'seed': 3}
    workdir.write_config(quick(now), str(tmp_path), step=10)
    changes = {change['key']: change for change in workdir.read_config(tmp_path)['changes']}
    assert {key: (change['step'], change['before'], change['after']) for key, change in changes.items()} == {
        'config.train.learning_rate': (10, 0.5, 0.25),
        'config.train.log_every': (10, 1, 7),
        'config.seed': (10, 0, 3),
    }
    printed = capsys.readouterr().out
    assert 'config.train.learning_rate is 0.25 from step 10 on; it was 0.5' in printed
    assert 'config.seed is 3' in printed and 'log_every' not in printed
    workdir.write_config(quick(now), str(tmp_path), step=20)
    assert len(workdir.read_config(tmp_path)['changes']) == 3


# The lock, folders and parameters.


def test_a_workdir_is_locked_for_one_run_at_a_time(tmp_path):
    refused = pytest.raises(RunError, match=rf'--workdir={tmp_path} cannot be used: process \d+ .*holds it')
    with workdir.lock(str(tmp_path)), refused, workdir.lock(str(tmp_path)):
        pass
    with workdir.lock(str(tmp_path)) as lock:
        assert not lock.lost()
        (tmp_path / '.lock').unlink()
        assert lock.lost()


def test_parameters_are_read_by_their_name_and_identified_by_their_values(tmp_path):
    config = quick()
    params, ema = random_params(config, 1), random_params(config, 2)
    make_run(tmp_path, config, 5, params=params, ema=ema)
    assert saved(tmp_path) == [5]
    abstract = build.build(config).abstract_state()
    found = {}
    for weights, expected in [('raw', params), ('ema', ema)]:
        step, found[weights] = workdir.load_params(abstract, config, str(tmp_path), weights)
        assert step == 5
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found[weights], expected))
        assert workdir.digest(found[weights]) == workdir.digest(expected)
    assert workdir.digest(params) != workdir.digest(ema)


# Compiled programs.


@pytest.fixture
def programs():
    """Turn JAX's cache off for the test. Yields (hits, a function that compiles a program of that name)."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    hits = []

    def use_cache(folder, seconds):
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
        compilation_cache.reset_cache()

    def listen(event, **_):
        if event == '/jax/compilation_cache/cache_hits':
            hits.append(event)

    def compiled(name):
        def program(x):
            return 2 * x + 1

        program.__name__ = name
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)  # else it is too small to be kept
        assert jax.jit(program).lower(1.0).compile()(1.0) == 3

    use_cache(None, 0)
    jax.monitoring.register_event_listener(listen)
    yield hits, compiled
    jax.monitoring.unregister_event_listener(listen)
    use_cache(*before)


def kept_in(folder):
    return {path.name for path in folder.rglob('*-cache')}


def test_compiled_programs_are_found_again(tmp_path, programs):
    """In the workdir or another folder, also if something was compiled before."""
    hits, compiled = programs
    config = default.get_config()
    compiled('before')
    for asked, where in [('workdir', tmp_path / 'run' / 'compiled'), (str(tmp_path / 'shared'), tmp_path / 'shared')]:
        config.compile_cache = asked
        workdir.use_compile_cache(config, str(tmp_path / 'run'))
        compiled('after')
        assert not hits
        (name,) = kept_in(where)
        assert 'after' in name
        compiled('after')
        assert hits.pop() and not hits and kept_in(where) == {name}


def test_compiled_programs_are_not_kept_if_the_cache_is_off(tmp_path, programs):
    hits, compiled = programs
    config = default.get_config()
    config.compile_cache = 'off'
    workdir.use_compile_cache(config, str(tmp_path / 'run'))
    compiled('once')
    compiled('once')
    assert not hits and not kept_in(tmp_path)


# A damaged config.json.

IMAGES = {'count': 3, 'fingerprint': 'f', 'sha256': 's', 'channel_means': [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ('part', 'value'),
    [
        ('images', 'x'),
        ('images', {'a': 1}),
        ('images', IMAGES | {'channel_means': ['x']}),
        ('train', 5),
        ('changes', 'x'),
        ('data', []),
        ('data', {}),
        ('data', {'image_size': 'x', 'channels': 3}),
        ('model', None),
        ('model', {}),
    ],
)
def test_a_damaged_config_is_named(tmp_path, part, value):
    """One without a record of images, as an imported run has it, is intact."""
    config = folder.get_config()
    config.data.source = f'folder:{tmp_path / "none"}'
    path = tmp_path / 'config.json'
    whole = config.to_dict() | {'data': {'image_size': 8, 'channels': 3}, 'model': autoconfig.choose_network(8, 0)}
    path.write_text(json.dumps(whole))
    assert workdir.resolve(config, str(tmp_path)).data.image_size == 8
    path.write_text(json.dumps(whole | {'images': IMAGES}))
    assert workdir.resolve(config, str(tmp_path)).data.image_size == 8
    path.write_text(json.dumps(whole | {part: value}))
    with pytest.raises(RunError, match=r'config.json cannot be read .*: restore it, or choose another --workdir'):
        workdir.resolve(config, str(tmp_path))
