"""The workdir: config.json and what it refuses, the lock, and the folder of compiled programs."""

import json
import os
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from diffusion import autoconfig, build, workdir
from diffusion.configs import default, digits, folder, mnist
from diffusion.configs import workdir as configs_workdir
from diffusion.modes import train
from diffusion.runtime import compilation
from diffusion.util import RunError
from tests.galleries import encoded, fill, noise
from tests.runs import dotted, make_run, quick, random_params, saved

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


@pytest.mark.parametrize(('stored', 'kept', 'others'), [(None, 1, [4]), (1, 1, [4]), (4, 4, [1]), (0, 0, [])])
def test_a_run_keeps_its_number_of_shards(tmp_path, stored, kept, others):
    """A run from before the key has one. An imported run has no number until it is trained."""
    config = quick({'data.shards': stored or 0}).to_dict()
    if stored is None:
        del config['data']['shards']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for training in (True, False):
        config = workdir.resolve(quick(), str(tmp_path), training=training)
        assert config.data.shards == kept
        workdir.check_config(config, str(tmp_path))
    for other in (1, 4):
        config = workdir.resolve(quick({'data.shards': other}), str(tmp_path), training=True)
        if other in others:
            with pytest.raises(RunError, match=f'config.data.shards: {kept} there, {other} asked'):
                workdir.check_config(config, str(tmp_path))
        else:
            workdir.check_config(config, str(tmp_path))


def test_a_renamed_picture_is_told_from_a_run_on_other_images(tmp_path):
    """The number of images and the preprocessing are the same on both sides."""
    root = fill(tmp_path / 'p', {f'{i}.png': encoded(noise(1, 8, 8, seed=i)[0]) for i in range(3)})
    config = quick({'data.source': f'folder:{root}', 'data.cache_dir': str(tmp_path / 'cache')})
    before = build.load_images(config)
    workdir.write_config(config, str(tmp_path / 'run'), before)
    (root / '0.png').rename(root / '5.png')
    after = build.load_images(config)
    with pytest.raises(RunError, match='renamed') as error:
        workdir.check_config(config, str(tmp_path / 'run'), after)
    for images in (before, after):
        assert images.record['sha256'][:12] in str(error.value)


def test_a_run_on_other_images_is_refused(tmp_path):
    config = quick()
    images = build.load_images(config)
    workdir.write_config(config, str(tmp_path), images)
    workdir.check_config(config, str(tmp_path), images)
    others = build.load_images(config, 'test')
    with pytest.raises(RunError, match=r'the images: 1498, preprocessing \w+ there; 299, preprocessing \w+ in digits'):
        workdir.check_config(config, str(tmp_path), others)


def test_other_images_are_accepted_if_asked_and_recorded_with_the_step(tmp_path, capsys):
    """Here the held-out images; the message that refuses them says how."""
    config = quick()
    before, after = build.load_images(config), build.load_images(config, 'test')
    workdir.write_config(config, str(tmp_path), before)
    with pytest.raises(RunError, match=r'--config\.train\.accept_other_images=True'):
        workdir.check_config(config, str(tmp_path), after)
    config.train.accept_other_images = True
    workdir.check_config(config, str(tmp_path), after)
    workdir.write_config(config, str(tmp_path), after, step=10)
    assert '299 other images from step 10 on; there were 1498' in capsys.readouterr().out
    stored = workdir.read_config(str(tmp_path))
    (change,) = stored['changes']
    assert stored['images'] == after.record
    assert (change['step'], change['before']['sha256'], change['after']) == (10, before.record['sha256'], after.record)
    workdir.check_config(quick(), str(tmp_path), after)  # without the key, too
    with pytest.raises(RunError, match='other images'):
        workdir.check_config(quick(), str(tmp_path), before)


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


# What a command need not repeat.

OVERRIDES = {'model.channels': 8, 'schedule.T': 4, 'data.source': 'digits', 'train.batch_size': 16}


@pytest.fixture
def made_with_overrides(tmp_path):
    """The workdir of a run that was made by --config=digits with these keys changed."""
    config = digits.get_config()
    config.update_from_flattened_dict(OVERRIDES)
    config.command.config, config.command.overrides = 'digits', tuple(OVERRIDES)
    workdir.write_config(config, str(tmp_path))
    return str(tmp_path)


def asked_by(config=digits, **overrides):
    asked = config.get_config()
    asked.update_from_flattened_dict(dotted(overrides))
    asked.command.overrides = tuple(dotted(overrides))
    return asked


def test_a_mode_that_reads_a_run_takes_what_its_command_changed(made_with_overrides):
    config = workdir.resolve(asked_by(), made_with_overrides)
    assert (config.model.channels, config.schedule.T, config.train.batch_size) == (8, 4, 32)
    workdir.check_config(config, made_with_overrides)
    moved = workdir.resolve(asked_by(data__source='folder:/moved'), made_with_overrides)
    assert moved.data.source == 'folder:/moved'
    workdir.check_config(moved, made_with_overrides)


@pytest.mark.parametrize(
    ('asked', 'words'),
    [
        (dict(model__channels=16), 'config.model.channels: 8 there, 16 asked'),
        (dict(schedule__name='cosine'), "config.schedule.name: 'linear' there, 'cosine' asked"),
        (dict(config=mnist), 'config.data.image_size: 8 there, 28 asked'),
    ],
)
def test_what_is_given_beside_a_run_must_agree(made_with_overrides, asked, words):
    config = workdir.resolve(asked_by(**asked), made_with_overrides)
    with pytest.raises(RunError) as error:
        workdir.check_config(config, made_with_overrides)
    assert words in str(error.value) and f'--workdir={made_with_overrides} without --config' in str(error.value)


@pytest.mark.parametrize(('asked', 'allowed'), [(0.01, 0.05), (0.2, 0.2)])
def test_the_pictures_that_were_left_out_with_the_size_may_be_left_out_again(tmp_path, asked, allowed):
    """And more if the command allows more."""
    workdir.write_config(quick({'data.max_bad_fraction': 0.05}), str(tmp_path))
    config = workdir.resolve(quick({'data.image_size': 0, 'data.max_bad_fraction': asked}), str(tmp_path))
    assert (config.data.image_size, config.data.max_bad_fraction) == (8, allowed)


def test_training_is_asked_for_everything_again(made_with_overrides):
    with pytest.raises(RunError, match='8 there, 32 asked'):
        workdir.check_config(workdir.resolve(asked_by(), made_with_overrides, training=True), made_with_overrides)


def test_the_config_of_a_run_keeps_what_its_first_command_changed(made_with_overrides):
    config = configs_workdir.get_config(made_with_overrides)
    config.train.num_steps = 5
    config.command.overrides = ('train.num_steps',)
    stored = workdir.write_config(config, made_with_overrides, step=1)
    assert stored['command'] == {'config': 'digits', 'overrides': sorted([*OVERRIDES, 'train.num_steps'])}


@pytest.mark.parametrize(
    ('part', 'key', 'value'), [('schedule', 'name', 'mine'), ('model', 'network', 'mine'), ('data', 'source', 'mine:')]
)
def test_a_run_with_entries_of_its_own_says_that_it_needs_its_config(tmp_path, part, key, value):
    stored = workdir.plain(digits.get_config()) | {'command': {'config': '/there/mine.py', 'overrides': []}}
    stored[part][key] = value
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    with pytest.raises(RunError, match=rf'config\.{part}\.{key} is .*give --config=/there/mine\.py'):
        workdir.resolve(configs_workdir.get_config(str(tmp_path)), str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(stored | {'model': stored['model'] | {'width': 3}}))
    with pytest.raises(SystemExit, match=r'config\.model\.width.*--config=/there/mine\.py'):
        configs_workdir.get_config(str(tmp_path))


@pytest.mark.parametrize(
    'content', ['null', '3', '[]', '{"data": 3}', '{', pytest.param('[' * 100_000, id='nested'), None]
)
def test_a_config_json_that_is_none_is_one_line(tmp_path, content):
    if content is None:
        os.mkfifo(tmp_path / 'config.json')
    else:
        (tmp_path / 'config.json').write_text(content)
    with pytest.raises(SystemExit, match=r'^error: [^\n]*config\.json[^\n]*$'):
        configs_workdir.get_config(str(tmp_path))
    with pytest.raises(RunError, match=r'config\.json cannot be read .*: restore it'):
        workdir.resolve(digits.get_config(), str(tmp_path))


# What a checkpoint says of itself, if config.json is gone or another run's.


@pytest.fixture(scope='module')
def two_layers(tmp_path_factory):
    """(workdir, params) of a run whose checkpoint records what it was trained as."""
    path, params = tmp_path_factory.mktemp('recorded'), random_params(quick(), 1)
    make_run(path, quick(), 5, params=params, ema=params)
    return path, params


def load(path, changes=None):
    config = quick(changes)
    return workdir.load_params(build.build(config).abstract_state(), config, str(path), 'ema')


@pytest.mark.parametrize(
    'changes',
    [{'schedule.name': 'cosine', 'model.kind': 'v'}, {'model.channels': 16}, {'data.crop': 'center'}],
    ids=lambda changes: ' '.join(changes),
)
@pytest.mark.parametrize('config_json', ['deleted', 'of another run'])
def test_another_identity_is_refused_by_the_checkpoint_alone(two_layers, tmp_path, changes, config_json):
    """Also a width, whose arrays would not fit, is refused by its key and not called damage."""
    path = shutil.copytree(two_layers[0], tmp_path / 'run')
    (path / 'config.json').unlink()
    if config_json == 'of another run':
        workdir.write_config(quick(changes), str(tmp_path / 'other'))
        shutil.copy(tmp_path / 'other' / 'config.json', path)
    with pytest.raises(RunError) as error:
        load(path, changes)
    for key, value in changes.items():
        part, _, name = key.partition('.')
        assert f'config.{key}: {quick()[part][name]!r} there, {value!r} asked' in str(error.value)
    assert 'damaged' not in str(error.value)


def test_a_run_whose_config_is_deleted_is_read_and_resumed_as_what_it_was(two_layers, tmp_path):
    path = shutil.copytree(two_layers[0], tmp_path / 'run')
    stored = workdir.read_config(str(path))
    (path / 'config.json').unlink()
    assert workdir.read_config(str(path)) == stored
    step, params = load(path)
    assert step == 5 and workdir.digest(params) == workdir.digest(two_layers[1])
    read = workdir.plain(configs_workdir.get_config(str(path)))  # as the command line does without --config
    assert {part: read[part] for part in workdir.IDENTITY} == {part: stored[part] for part in workdir.IDENTITY}
    workdir.write_config(quick(), str(path), step=5)
    assert workdir.read_config(str(path)) == stored


def test_arrays_of_another_network_under_the_same_keys_are_not_called_damaged(two_layers):
    """As when the code of a network changes: the first arrays are named, with both shapes."""
    abstract = build.build(quick()).abstract_state()
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), abstract)
    with pytest.raises(
        RunError, match=r"/5 holds another network .*\['conv_in'\]\['bias'\] is \[8\] there, \[8, 2\] here"
    ):
        workdir.load_params(wider, quick(), str(two_layers[0]), 'raw')


@pytest.mark.parametrize(
    'content', [b'null', b'[1]', b'{"record": 3}', pytest.param(b'[' * 100_000, id='nested'), None]
)
def test_a_checkpoint_with_a_damaged_record_is_damaged(two_layers, tmp_path, content):
    """None is a pipe, which must not block."""
    path = shutil.copytree(two_layers[0], tmp_path / 'run')
    file = path / 'checkpoints' / '5' / 'about' / 'metadata'
    if content is None:
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    with pytest.raises(RunError, match=r'no intact checkpoint.*\n.*/5 is damaged'):
        load(path)


# A run whose checkpoints are gone.


def test_without_checkpoints_a_run_is_not_begun_again_unasked(two_layers, tmp_path):
    path = shutil.copytree(two_layers[0], tmp_path / 'run')
    config = quick({'train.num_steps': 1})
    before = {file: file.read_bytes() for file in path.glob('*.json')}
    for gone in ('checkpoints/5', 'checkpoints'):
        shutil.rmtree(path / gone)
        with pytest.raises(RunError, match=r'saved at step 5, but none .*--config\.train\.begin_again=True'):
            train.run(config, str(path))
        with pytest.raises(RunError, match='step 5 was saved'):
            load(path)
    assert {file: file.read_bytes() for file in path.glob('*.json')} == before and not (path / 'logs').exists()
    config.train.begin_again = True
    assert train.run(config, str(path)) == 0
    assert saved(path) == [1] and workdir.last_saved(str(path)) == 1
    assert train.run(config, str(path)) == 0  # the key is no order to start over
    assert saved(path) == [1]


@pytest.mark.parametrize('logged', [10, 11])
def test_the_log_of_a_run_shows_that_it_had_checkpoints(two_layers, tmp_path, logged):
    """Also without saved.json; two checkpoints, after 5 and 10 steps, may be unfinished when a run is killed."""
    path = shutil.copytree(two_layers[0], tmp_path / 'run', ignore=shutil.ignore_patterns('5', 'saved.json'))
    stored = json.loads((path / 'config.json').read_text())
    stored['train']['checkpoint_every'] = 5
    (path / 'config.json').write_text(json.dumps(stored))
    (path / 'logs').mkdir(exist_ok=True)
    (path / 'logs' / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{{"step": {logged}}}\n{{"step": 1')
    config = quick({'train.num_steps': 1})
    if logged == 10:
        workdir.require_no_history(config, str(path))
        return
    with pytest.raises(RunError, match=r'a run whose log reaches step 11, but no .*--config\.train\.begin_again=True'):
        workdir.require_no_history(config, str(path))
    config.train.begin_again = True
    workdir.require_no_history(config, str(path))


def test_any_checkpoint_that_is_kept_can_be_read(two_layers, tmp_path):
    path = shutil.copytree(two_layers[0], tmp_path / 'run')
    later = random_params(quick(), 7)
    make_run(path, quick(), 7, params=later, ema=later)
    abstract = build.build(quick()).abstract_state()
    for step, expected in [(5, two_layers[1]), (7, later), (-1, later)]:
        _, params = workdir.load_params(abstract, quick(), str(path), 'ema', step)
        assert workdir.digest(params) == workdir.digest(expected)
    with pytest.raises(RunError, match=r'no checkpoint of step 6 .* steps 5, 7 '):
        workdir.load_params(abstract, quick(), str(path), 'ema', 6)


# Folders of results.


@pytest.mark.parametrize(
    ('part', 'kind'),
    [
        ('sample', 'samples'),
        ('likelihood', 'likelihood'),
        ('interop', 'export'),
        ('evaluate', 'evaluations'),
        ('sweep', 'sweep'),
    ],
)
def test_results_are_written_where_the_config_says(tmp_path, part, kind):
    run = tmp_path / 'run'
    run.mkdir()
    (run / kind).write_text('not a folder')
    with pytest.raises(RunError, match=rf'--config\.{part}\.folder='):
        workdir.output_folder(quick(), str(run), part, kind)
    elsewhere = quick({f'{part}.folder': str(tmp_path / 'elsewhere')})
    assert workdir.output_folder(elsewhere, str(run), part, kind) == str(tmp_path / 'elsewhere')
    assert (tmp_path / 'elsewhere').is_dir()
    assert configs_workdir.get_config(str(make_config(run, elsewhere)))[part].folder == ''


def make_config(path, config):
    workdir.write_config(config, str(path))
    return path


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


def test_compiled_programs_are_found_again(tmp_path, programs, monkeypatch):
    """In the user's cache or another folder, which nobody else can read, also if something was compiled before."""
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    hits, compiled = programs
    config = default.get_config()
    compiled('before')
    for asked, where in [('', tmp_path / 'cache' / 'diffusion' / 'compiled'), (f'{tmp_path}/mine', tmp_path / 'mine')]:
        config.compile_cache = asked
        workdir.use_compile_cache(config)
        assert where.stat().st_mode & 0o777 == 0o700
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
    workdir.use_compile_cache(config)
    compiled('once')
    compiled('once')
    assert not hits and not kept_in(tmp_path)


@pytest.mark.parametrize('owned_by', ['others may write', 'the group may write', 'another user'])
def test_programs_that_someone_else_could_have_written_are_not_run(tmp_path, programs, capsys, monkeypatch, owned_by):
    hits, compiled = programs
    config = default.get_config()
    config.compile_cache = str(tmp_path / 'shared')
    workdir.use_compile_cache(config)
    compiled('once')
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()
    if owned_by == 'another user':
        monkeypatch.setattr(os, 'geteuid', lambda: os.stat(tmp_path).st_uid + 1)
    else:
        (tmp_path / 'shared').chmod(0o777 if owned_by == 'others may write' else 0o770)
    workdir.use_compile_cache(config)
    assert 'only you can write' in capsys.readouterr().out
    compiled('once')
    assert not hits


def test_a_workdir_names_no_folder_of_programs(tmp_path):
    """Else the workdir of someone else could bring code."""
    stored = quick({'compile_cache': f'{tmp_path}/evil'})
    workdir.write_config(stored, str(tmp_path))
    assert configs_workdir.get_config(str(tmp_path)).compile_cache == ''


def test_the_oldest_programs_are_removed_and_nothing_else(tmp_path, monkeypatch):
    """The folder may be one that the user has for other things as well."""
    monkeypatch.setattr(compilation, 'LARGEST_CACHE', 250)
    others = ['thesis.tex', 'cache', 'a-cache.zip']
    for i, name in enumerate([*others, 'a-cache', 'b-cache', 'c-cache', 'd-cache']):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (i, i))
    (tmp_path / 'pip-cache').mkdir()
    tmp_path.chmod(0o700)
    assert compilation.private_folder(str(tmp_path)) == str(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, 'c-cache', 'd-cache', 'pip-cache'}


def test_another_process_may_remove_the_same_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, 'LARGEST_CACHE', 0)
    for name in ('a-cache', 'b-cache'):
        (tmp_path / name).write_bytes(bytes(100))
    remove = os.remove
    monkeypatch.setattr(os, 'remove', lambda path: (remove(path), remove(path)))
    tmp_path.chmod(0o700)
    assert compilation.private_folder(str(tmp_path)) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    whole = config.to_dict() | {
        'data': {'image_size': 8, 'channels': 3},
        'model': autoconfig.choose_network(8, 0, 'cpu'),
    }
    path.write_text(json.dumps(whole))
    assert workdir.resolve(config, str(tmp_path)).data.image_size == 8
    path.write_text(json.dumps(whole | {'images': IMAGES}))
    assert workdir.resolve(config, str(tmp_path)).data.image_size == 8
    path.write_text(json.dumps(whole | {part: value}))
    with pytest.raises(RunError, match=r'config.json cannot be read .*: restore it, or choose another --workdir'):
        workdir.resolve(config, str(tmp_path))
