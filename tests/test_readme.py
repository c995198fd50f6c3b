"""The README and the docs say what is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]


def test_the_lines_of_python_run():
    (program,) = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
    names = {}
    exec(program, names)
    assert names['ddim'].shape == names['ddpm'].shape == (4, 8, 8, 1)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_files_functions_and_tests_that_are_named_exist(page):
    text = page.read_text(encoding='utf-8')
    for path, test in re.findall(r'`((?:tests|configs|docs|benchmarks|diffusion)/[\w/.]+?)(?:::(\w+))?`', text):
        assert (ROOT / path).exists(), path
        assert not test or f'def {test}(' in (ROOT / path).read_text(encoding='utf-8'), test
    for path in re.findall(r'\]\(([\w/.]+)\)', text):
        assert (page.parent / path).exists(), path
    paper = [*(ROOT / 'diffusion').glob('*.py'), *(ROOT / 'diffusion' / 'likelihood').glob('*.py')]
    modules = {path.stem: path for path in paper if path.stem not in ('train', 'generate', 'evaluate', 'experiment')}
    for module, name in re.findall(r'`(?:likelihood\.|networks\.)?(\w+)\.(\w+)(?:\(.*?\))?`', text):
        if module in modules and name not in ('py', 'md', 'json'):
            assert re.search(rf'^\s*(?:def|class) {name}\b', modules[module].read_text(encoding='utf-8'), re.M), name


def test_nothing_is_left_to_be_filled_in():
    for page in PAGES:
        assert not re.search(r'\b(TODO|TBD|FIXME|[A-Z]{3,}_[A-Z]{3,})\b', page.read_text(encoding='utf-8'))
