"""The pages: their programs run, and the files, functions, tests, keys and commands that they name exist."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import compat, gaussian, interop, loss, networks, sampler, schedule
from diffusion.configs import default
from diffusion.data import pictures, sources

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'benchmarks' / 'README.md', *(ROOT / 'docs').glob('*.md')]
CHANGELOG = ROOT / 'CHANGELOG.md'  # names what is gone, too
TABLES = [
    compat.COMPAT,
    gaussian.KINDS,
    interop.READERS,
    loss.WEIGHTINGS,
    networks.IMPLEMENTATIONS,
    networks.NETWORKS,
    pictures.CROPS,
    sampler.RULES,
    schedule.SCHEDULES,
    schedule.SPACINGS,
    sources.SOURCES,
]
CONFIG = default.get_config()
SUFFIXES = {'cfg', 'html', 'jsonl', 'json', 'md', 'npz', 'png', 'py', 'sbatch', 'sh', 'txt', 'yaml'}


def name_of(page):
    return str(page.relative_to(ROOT))


def read(page):
    return page.read_text(encoding='utf-8')


def programs(page):
    return re.findall(r'```python\n(.*?)```', read(page), re.DOTALL)


def run(program):
    names = {}
    exec(program, names)
    return names


@pytest.fixture
def restored_tables():
    """Undoes what a program adds to the tables."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def test_the_program_of_the_readme_runs():
    (program,) = programs(ROOT / 'README.md')
    names = run(program)
    assert names['ddim'].shape == names['ddpm'].shape == (4, 8, 8, 1)


def program_of_contributing(name):
    (program,) = (program for program in programs(ROOT / 'CONTRIBUTING.md') if f"['{name}'] = " in program)
    return program


def test_the_spacing_of_contributing_decreases(restored_tables):
    run(program_of_contributing('squares'))
    levels = schedule.timesteps(1000, 20, 'squares')
    assert (len(levels), levels[0], levels[-1]) == (21, 1000, 0)
    assert (np.diff(levels) < 0).all() and (np.diff(np.diff(levels)) >= 0).all()  # small steps at low levels


def test_the_parameterization_of_contributing_is_inverted(restored_tables):
    run(program_of_contributing('score'))
    linear, t = schedule.linear(100), jnp.array([1, 30, 100])
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    x_t = gaussian.q_sample(linear, x0, t, eps)
    score = gaussian.target(linear, 'score', x0, t, eps)
    np.testing.assert_allclose(score, (linear.signal(t)[:, None] * x0 - x_t) / linear.noise(t)[:, None] ** 2, rtol=1e-3)
    found = gaussian.predict(linear, 'score', score, x_t, t)
    np.testing.assert_allclose(found.x0, x0, atol=1e-4)
    np.testing.assert_allclose(found.eps, eps, atol=1e-4)


def test_the_rule_of_contributing_is_of_higher_order_than_ddim(restored_tables):
    """For data N(0.5, 0.3²) the flow is linear: it carries x_T to the x_0 that is as many standard deviations away."""
    run(program_of_contributing('plms'))
    linear, mean, std = schedule.linear(1000), 0.5, 0.3

    def moments(t):
        return linear.signal(t) * mean, jnp.sqrt((linear.signal(t) * std) ** 2 + linear.noise(t) ** 2)

    def net(x_t, t):
        center, width = moments(t)
        return linear.noise(t) * (x_t - center) / width**2

    x_T = jnp.linspace(-2, 2, 5)
    center, width = moments(1000)
    exact = mean + std * (x_T - center) / width
    how = dict(shape=(), timesteps=schedule.timesteps(1000, 50), kind='eps', eta=0.0, clip=False, x_T=x_T)
    keys = jax.random.split(jax.random.key(0), 5)
    errors = {
        rule: abs(sampler.sample(keys, linear, net, rule=rule, **how) - exact).max() for rule in ('kernel', 'plms')
    }
    assert errors['plms'] < errors['kernel'] / 3


def exists(name):
    """Whether a dotted name is a config key, or something in the package."""
    part, _, key = name.partition('.')
    if part in CONFIG and key in CONFIG[part]:
        return True
    path = name.split('.')
    for prefix in ('diffusion', 'diffusion.likelihood'):
        for length in range(len(path) - 1, 0, -1):
            try:
                found = importlib.import_module('.'.join([prefix, *path[:length]]))
            except ImportError:
                continue
            for attribute in path[length:]:
                found = getattr(found, attribute, None)
            if found is not None:
                return True
    return False


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_files_and_functions_exist(page):
    text = read(page)
    for path, test in re.findall(r'`((?:tests|configs|docs|benchmarks|diffusion|launch)/[\w/.]*?)(?:::(\w+))?`', text):
        assert (ROOT / path).exists(), path
        assert not test or f'def {test}(' in read(ROOT / path), test
    known = {path.stem for path in (ROOT / 'diffusion').rglob('*')} | {*CONFIG}
    for name in re.findall(r'`(\w+(?:\.\w+)+)(?:\([^`]*\)|=[^`]*)?`', text):
        if name.split('.')[0] in known and name.split('.')[-1] not in SUFFIXES:
            assert exists(name), name


def anchors(page):
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)', read(page), re.MULTILINE)
    return [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]


@pytest.mark.parametrize('page', [*PAGES, CHANGELOG], ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\((?!https?:)([^)]+)\)', read(page)):
        path, _, anchor = link.partition('#')
        target = page.parent / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_commands_exist(page):
    text, makefile = read(page), read(ROOT / 'Makefile')
    for target in re.findall(r'(?:`|^ {4}|&& )make (?:[A-Z]\S* )*([a-z][\w-]*)', text, re.M):
        assert re.search(rf'^{target}:', makefile, re.M), target
    for module in re.findall(r'python -m ((?:benchmarks|diffusion|tests)[\w.]*)', text):
        path = ROOT / module.replace('.', '/')
        assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), module
    for key in re.findall(r'--config\.([a-z][\w.]*)', text):
        part, _, name = key.partition('.')
        assert (name or part) in (CONFIG[part] if name else CONFIG) or key == 'model.width', key  # of CONTRIBUTING.md


@pytest.mark.parametrize('page', [*PAGES, CHANGELOG], ids=name_of)
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.search(r'\b(TODO|TBD|FIXME|[A-Z]{3,}_[A-Z]{3,})\b', read(page))
