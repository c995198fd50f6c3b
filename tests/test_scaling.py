"""The scaling model: its limits, and that docs/scaling.md and docs/cluster.md show its numbers."""

import dataclasses
import pathlib

import pytest

from benchmarks import report, scaling

ROOT = pathlib.Path(__file__).parent.parent
DEVICE = scaling.Device(flops=1e12, memory=1e12, near=1e9, group=8, far=1e8, hop=0.0)


def test_the_page_shows_the_table_of_the_model():
    page = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
    assert scaling.markdown(scaling.paper()) in page


def test_one_device_takes_no_time_to_reduce():
    assert scaling.all_reduce_time(1e9, 1, dataclasses.replace(DEVICE, hop=1.0)) == 0


def test_a_large_ring_sends_each_byte_almost_twice():
    """Each byte is sent once to be added and once more as part of the sum."""
    assert scaling.all_reduce_time(1e9, 2, DEVICE) == pytest.approx(1.0)
    assert scaling.all_reduce_time(1e9, 8, DEVICE) == pytest.approx(2 * 7 / 8)
    one_group = dataclasses.replace(DEVICE, group=10**6)
    assert scaling.all_reduce_time(1e9, 10**6, one_group) == pytest.approx(2, rel=1e-3)


def test_between_groups_each_device_sends_its_part():
    """In two groups of eight, each device sends an eighth of the bytes over the slow links."""
    within, both = (scaling.all_reduce_time(1e9, n, DEVICE) for n in (8, 16))
    assert both - within == pytest.approx(1e9 / 8 / 1e8)


def test_the_conclusions_of_the_page_follow_from_the_model():
    for device in scaling.DEVICES.values():
        cifar, lsun = scaling.NETWORKS['CIFAR-10'], scaling.NETWORKS['LSUN 256']
        few, many = (scaling.step_time(cifar, device, n, 128)['step'] for n in (8, 128))
        assert 1 < few / many < 3
        few, many = (scaling.step_time(lsun, device, n, 8 * n)['step'] for n in (8, 1024))
        assert few / many > 0.85
    far = scaling.step_time(cifar, scaling.DEVICES['H100, NVLink + 400 Gb/s each'], 64, 1024)
    assert far['reduce'] > 0.75 * far['compute']


def test_overlapping_the_reduction_saves_at_most_the_reduction():
    for row in scaling.paper():
        assert (row['compute ms'] + row['update ms']) * (1 - 1e-9) <= row['hidden ms'] <= row['step ms']
        assert 0 < row['efficiency'] <= row['efficiency, hidden'] <= 1 + 1e-9


def test_the_pages_show_the_measured_memory_and_rates():
    (result,) = (found['scaling'] for found in report.load().values() if 'scaling' in found)
    page = (ROOT / 'docs' / 'cluster.md').read_text(encoding='utf-8')
    assert scaling.markdown_of_memory(result) in page
    page = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
    assert scaling.markdown_of_rates(result) in page
