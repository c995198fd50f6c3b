"""The benchmarks' tables and records; one of the slow tests runs a benchmark."""

import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

from benchmarks import gpu, peers, record, report

ROOT = pathlib.Path(__file__).parent.parent


def test_the_page_shows_the_results():
    page = (ROOT / 'benchmarks' / 'README.md').read_text(encoding='utf-8')
    assert report.BEGIN + report.page(report.load()) + report.END in page


def figures(ours, theirs, megabytes):
    return {'seconds': {'ours': ours, 'eager': theirs}, 'megabytes': megabytes}


def test_a_row_has_the_median_of_the_ratios_and_the_ratio_of_memory():
    task = peers.TASKS['peers'][0]
    measured = {task.name: figures([1.0, 2.0, 9.0], [2.0, 2.0, 3.0], {'ours': 30.0, 'eager': 20.0})}
    (row,) = [line for line in report.table('peers', measured).splitlines() if task.name in line]
    assert '| 2 | eager | 1.00 (0.50 … 3.00) | ≤ 1.0 | 1.50 |' in row
    assert report.table('peers', measured).count(report.MISSING) == 3 * (len(peers.TASKS['peers']) - 1)


def test_missing_measurements_are_marked():
    page = report.page({})
    assert page.count(report.MISSING) > 20 and 'png' not in page


def test_a_benchmark_replaces_only_its_own_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, 'RESULTS', str(tmp_path))
    record.store('one', {'seconds': 1.0})
    record.store('two', {'seconds': 2.0}, ' --fast', torch='9')
    record.store('one', {'seconds': 3.0})
    (found,) = report.load(str(tmp_path)).values()
    assert found['one']['seconds'] == 3.0 and found['one']['command'] == 'python -m benchmarks.one'
    assert found['two']['command'].endswith('two --fast') and found['two']['versions']['torch'] == '9'
    assert json.loads(capsys.readouterr().out.split('}\n{')[0] + '}')['seconds'] == 1.0


@pytest.mark.slow
def test_ours_is_measured_if_the_peers_are_not_installed():
    task = next(task for task in peers.TASKS['peers'] if task.config == 'digits' and not task.num_steps)
    command = [sys.executable, '-m', 'benchmarks.peers', '--repetitions=1', f'--task={task.name}']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=True)
    assert done.stdout.startswith(task.name) and ' s' in done.stdout


@pytest.mark.slow
def test_the_hour_on_a_gpu_is_rehearsed(tmp_path):
    """Every part ends well, and leaves its results."""
    results = tmp_path / 'results'
    command = ['bash', 'benchmarks/gpu_all.sh', str(tmp_path), str(results), '--rehearse']
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {'PYTHON': sys.executable}, check=True
    )
    for part in ('table', 'kernels', 'train', 'sample', 'plan', 'check'):
        assert f'── {part} ended with 0' in done.stdout, done.stdout
    there = {file.name for file in results.iterdir()}
    assert {'metrics.jsonl', 'grid.png', 'record.json', 'last-sheet.png', 'plan-beside-run.json'} <= there


def test_the_parts_on_a_gpu_take_at_most_eleven_minutes():
    """The limits of the commands are those of the comment, in the same order."""
    text = (ROOT / 'benchmarks' / 'gpu_all.sh').read_text(encoding='utf-8')
    said = re.findall(r'^#     (\w+) +(\d+) s ', text, re.MULTILINE)
    most = re.search(r'TABLE_SECONDS:-(\d+)', text)[1]
    limits = re.findall(r'^part (.+?) (\w+) ', text.replace('$((most + 200))', str(int(most) + 200)), re.MULTILINE)
    assert said == [(name, seconds) for seconds, name in limits]
    assert sum(int(seconds) for _, seconds in said) <= 660
    assert re.search(r'PARTS:-(.*?)}', text)[1].split() == [name for name, _ in said]


def test_a_plan_is_shown_beside_its_run(tmp_path):
    """Of 128 images and a median rate of 4,000 images/s."""
    (tmp_path / 'logs').mkdir()
    (tmp_path / 'plan').mkdir()
    planned = {'images': 128, 'peak_bytes': 2_500, 'bound': {'seconds': 0.005, 'sum': None}}
    (tmp_path / 'plan' / 'here.json').write_text(json.dumps({'programs': {'train': planned}}))
    lines = [{'images_per_second': rate, 'peak_bytes': 3_000} for rate in (1_000, 4_000, 5_000)]
    (tmp_path / 'logs' / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    assert gpu.beside(str(tmp_path)) == {
        'bytes of a device': {'planned': 2_500, 'measured': 3_000},
        'seconds of a step': {'at least': 0.005, 'sum': None, 'measured': 0.032},
        'intervals': 3,
    }


@pytest.fixture
def without_pip(tmp_path):
    """An environment whose python3 does everything but download packages."""
    (tmp_path / 'bin').mkdir()
    script = f'#!/bin/sh\n[ "$2" = pip ] || exec {sys.executable} "$@"\n'
    (tmp_path / 'bin' / 'python3').write_text(script)
    (tmp_path / 'bin' / 'python3').chmod(0o755)
    return os.environ | {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'}


@pytest.mark.parametrize(
    ('name', 'nbytes', 'said'), [('test/1.png', 0, 'folder train/'), ('train/1.png', 65, '64 MiB')]
)
def test_what_cannot_be_sent_to_a_gpu_is_refused(tmp_path, without_pip, name, nbytes, said):
    with zipfile.ZipFile(tmp_path / 'pictures.zip', 'w') as file:
        file.writestr(name, b'a picture')
    (tmp_path / 'to').mkdir()
    with open(tmp_path / 'to' / 'wheel', 'wb') as file:
        file.truncate(nbytes * 2**20)
    command = ['bash', 'benchmarks/gpu_wheels.sh', str(tmp_path / 'to'), str(tmp_path / 'pictures.zip')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=without_pip)
    assert done.returncode == 1 and said in done.stderr
