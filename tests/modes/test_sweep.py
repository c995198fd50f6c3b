"""--mode=sweep: its cells, what they share, and that it resumes."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import build, conditions, sampler, workdir
from diffusion.modes import evaluate, sample, sweep
from diffusion.modes.likelihood import ZeroNetwork
from diffusion.util import RunError
from tests.runs import make_run, quick, random_params

SWEEP = {
    'sample.num_images': 6,
    'sample.batch_size': 6,
    'sample.metrics': ('FD-pixels', 'precision-pixels'),
    'sweep.num_images': 0,
    'sweep.num_steps': (1, 3),
    'sweep.etas': (0.0,),
}
CELLS = list(itertools.product(((0.0, 'small'), (1.0, 'large')), (1, 3)))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    config = quick(SWEEP)
    params = random_params(config, 1)
    return make_run(tmp_path_factory.mktemp('run'), config, 5, params=params, ema=params)


@pytest.fixture(scope='module')
def swept(trained):
    """The folder of a sweep."""
    assert sweep.run(quick(SWEEP), str(trained)) == 0
    (folder,) = (trained / 'sweep').iterdir()
    return folder


def read(folder):
    return json.loads((folder / 'sweep.json').read_text(encoding='utf-8'))


def test_every_cell_has_every_metric(swept):
    cells = read(swept)['cells']
    found = [((cell['eta'], cell['variance']), cell['num_steps'], cell['metric']) for cell in cells]
    assert found == [(*cell, metric) for cell in CELLS for metric in SWEEP['sample.metrics']]
    for cell in cells:
        assert cell['rule'] == 'kernel' and cell['n'] == 6
        assert np.isfinite([cell['value'], cell['standard_error']]).all()
    values = {
        steps: {cell['value'] for cell in cells if (cell['num_steps'], cell['metric']) == (steps, 'FD-pixels')}
        for steps in (1, 3)
    }
    assert len(values[1]) == 1 and len(values[3]) == 2  # a single step, to level 0, has no noise


@pytest.mark.parametrize(('eta', 'variance'), [(0.0, 'small'), (1.0, 'large')])
def test_a_cell_has_the_images_and_the_value_of_mode_sample(trained, swept, tmp_path, eta, variance):
    asked = {'num_steps': 3, 'eta': eta, 'variance': variance, 'folder': str(tmp_path)}
    assert sample.run(quick(SWEEP | {f'sample.{key}': value for key, value in asked.items()}), str(trained)) == 0
    (folder,) = tmp_path.iterdir()
    with np.load(folder / 'samples.npz') as file:
        np.testing.assert_array_equal(
            np.load(swept / 'cells' / f'eta{eta:g}-{variance}-3.npy'), file['arr_0'][: sweep.SHOWN]
        )
    metrics = json.loads((folder / 'record.json').read_text(encoding='utf-8'))['metrics']
    (entry,) = (entry for entry in metrics if entry['name'] == 'FD-pixels')
    (cell,) = (
        cell
        for cell in read(swept)['cells']
        if (cell['eta'], cell['variance'], cell['num_steps'], cell['metric']) == (eta, variance, 3, 'FD-pixels')
    )
    assert (cell['value'], cell['standard_error']) == (entry['value'], entry['standard_error'])


def test_the_table_the_plot_and_the_sheet_show_the_cells(swept):
    table = (swept / 'sweep.md').read_text(encoding='utf-8')
    lines = table.splitlines()
    assert lines[0] == 'FD-pixels (pixels, [-1,1]) of 6 images' and lines[2] == '| | 1 steps | 3 steps |'
    assert [line.split(' | ')[0] for line in lines[4:6]] == ['| η = 0', '| σ̂']
    for cell in read(swept)['cells']:
        assert f'{cell["value"]:.4g} ± ' in table
    with Image.open(swept / 'contact.png') as picture, Image.open(swept / 'sweep.png') as plot:
        assert picture.size == (8 * 52 + 4, 2 * 52 + 4)  # 2 cells with 4 images in each of 2 rows
        assert np.ptp(np.asarray(plot)) > 0


def test_each_dialect_has_a_table_of_its_own():
    cell = {'eta': 0.0, 'variance': 'small', 'metric': 'FID', 'features': 'inception', 'standard_error': 1.0, 'n': 9}
    rows = [
        cell | {'num_steps': steps, 'dialect': dialect, 'value': value}
        for steps, dialect, value in ((10, 'adm', 4.0), (10, 'clean-fid', 5.0), (20, 'adm', 3.0))
    ]
    first, second = sweep.markdown(rows).split('\n\nFID (inception, clean-fid) of 9 images\n\n')
    assert first.splitlines()[2:] == ['| | 10 steps | 20 steps |', '|---|---|---|', '| η = 0 | 4 ± 1 | 3 ± 1 |']
    assert second.splitlines() == ['| | 10 steps |', '|---|---|', '| η = 0 | 5 ± 1 |', '']
    assert [*sweep.curves(rows)] == ['FID (inception, adm)', 'FID (inception, clean-fid)']


def test_every_cell_starts_from_the_same_noise(monkeypatch):
    """Also with a spacing whose first level depends on the number of steps: each takes its own, from the same x_T."""
    first = sampler.Rule(
        lambda x_T: x_T, lambda x_T, x_t, t, s, std, **_: (x_T, jnp.where(t > s, x_T + t - s, jnp.nan))
    )
    monkeypatch.setitem(sampler.RULES, 'span', first)
    config = quick(SWEEP | {'sample.spacing': 'leading', 'sample.rule': 'span', 'sample.batch_size': 4})
    exp = build.build(config)
    exp = dataclasses.replace(exp, network=ZeroNetwork(exp.network.make))
    none = conditions.Conditions((), None, conditions.condition(exp), {})
    draw = sweep.make_row_sampler(config, exp, none, {}, (8, 8, 1), sweep.Cell(0.0, 'small', 4))
    two, four = (
        draw({}, 0, 0, 4, steps=sweep.make_steps(config, exp, sweep.Cell(0.0, 'small', count))) for count in (2, 4)
    )
    np.testing.assert_array_equal(two, four)  # the last step is from level 1 to 0 in both
    assert len(np.unique(two)) == two.size


@pytest.mark.slow
@pytest.mark.parametrize(('key', 'value'), [('clip', False), ('spacing', 'linspace')])
def test_another_setting_is_another_sweep(trained, swept, tmp_path, key, value):
    """Finished cells of one are not taken for those of the other."""
    changes = {f'sample.{key}': value, 'sweep.num_steps': (3,), 'sweep.large': False, 'sweep.folder': str(tmp_path)}
    assert sweep.run(quick(SWEEP | changes), str(trained)) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name != swept.name


def test_a_row_has_one_program(trained, monkeypatch, tmp_path):
    compiled, make_draw = [], sweep.make_draw

    def recorded(*arguments, **how):
        compiled.append(how)
        return make_draw(*arguments, **how)

    monkeypatch.setattr(sweep, 'make_draw', recorded)
    assert sweep.run(quick(SWEEP | {'sweep.folder': str(tmp_path)}), str(trained)) == 0
    assert len(compiled) == len({row for row, _ in CELLS}) < len(CELLS)


def test_finished_cells_are_not_computed_again(trained, swept, monkeypatch):
    before = read(swept)
    (swept / 'cells' / 'eta1-large-3.json').unlink()
    computed, measure = [], evaluate.measure

    def recorded(config, plan, images, *arguments):
        computed.append(len(images))
        return measure(config, plan, images, *arguments)

    monkeypatch.setattr(evaluate, 'measure', recorded)
    assert sweep.run(quick(SWEEP), str(trained)) == 0
    assert computed == [6] and read(swept) == before


def test_a_cell_is_measured_once_its_reference_is_there_and_by_no_other(trained, tmp_path):
    pictures = tmp_path / 'pictures'
    one = SWEEP | {'sweep.num_steps': (3,), 'sweep.large': False, 'sweep.folder': str(tmp_path / 'sweep')}
    one |= {'data.source': f'folder:{pictures}', 'sample.metrics': ('FD-pixels',)}

    def write(seed):
        (pictures / 'train').mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (30, 8, 8), dtype=np.uint8)):
            Image.fromarray(pixels).save(pictures / 'train' / f'{i}.png')

    def cells():
        (folder,) = (tmp_path / 'sweep').iterdir()
        return read(folder)['cells']

    assert sweep.run(quick(one), str(trained)) == 0
    assert cells() == []
    write(0)
    assert sweep.run(quick(one), str(trained)) == 0
    assert [cell['metric'] for cell in cells()] == ['FD-pixels']
    write(1)
    with pytest.raises(RunError, match='compared with different images'):
        sweep.run(quick(one | {'sweep.num_steps': (1, 3)}), str(trained))


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'num_steps': (2, 5)}, r'config\.sweep .*5'),
        ({'num_steps': ()}, 'asks for nothing'),
        ({'num_steps': (0,)}, r'config\.sweep\.num_steps is \(0,\), but must be a tuple, each value 1 to'),
        ({'etas': (1.5,)}, r'config\.sweep\.etas'),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_drawn(trained, monkeypatch, changes, words):
    monkeypatch.setattr(workdir, 'load_params', lambda *_: pytest.fail('weights are read'))
    with pytest.raises(RunError, match=words):
        sweep.run(quick(SWEEP | {f'sweep.{key}': value for key, value in changes.items()}), str(trained))
