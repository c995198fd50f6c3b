"""Logs: each step once in metrics.jsonl and in TensorBoard's events, also after a restart or a crash."""

import json
import os
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from diffusion.runtime.logs import Writer


def log(directory, *, step, steps):
    with Writer(str(directory), step=step) as writer:
        for k in steps:
            writer.scalars(k, loss=1 / k, learning_rate=k * 1e-3)
    for path in directory.glob('events.*'):  # tensorboardX names files by the second; here several are opened in one
        path.rename(path.with_name(f'events.{time.time_ns()}' if path.name.count('.') > 1 else path.name))


def lines(directory):
    return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def events(directory):
    """Yield all TensorBoard events, oldest file first. A record is length, checksum, Event, checksum."""
    for path in sorted(directory.glob('events.*')):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack_from('<Q', content)
            yield Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]


def test_both_logs_hold_the_same_numbers(tmp_path):
    log(tmp_path / 'logs', step=0, steps=[1, 2])
    assert lines(tmp_path / 'logs') == [
        {'step': 1, 'loss': 1.0, 'learning_rate': 0.001},
        {'step': 2, 'loss': 0.5, 'learning_rate': 0.002},
    ]
    seen = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / 'logs')
        for value in event.summary.value
    ]
    assert seen == [
        (step, tag, pytest.approx(value))
        for step, tag, value in [
            (1, 'loss', 1.0),
            (1, 'learning_rate', 0.001),
            (2, 'loss', 0.5),
            (2, 'learning_rate', 0.002),
        ]
    ]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Writer(str(tmp_path), step=0) as writer:
        writer.scalars(1, loss=float('nan'), grad_norm=float('inf'), rate=0.5)
    assert lines(tmp_path) == [{'step': 1, 'loss': None, 'grad_norm': None, 'rate': 0.5}]


def test_each_line_is_on_disk_at_once(tmp_path):
    with Writer(str(tmp_path), step=0) as writer:
        writer.scalars(1, loss=0.5)
        assert [line['step'] for line in lines(tmp_path)] == [1]


def test_repeated_steps_are_logged_once(tmp_path):
    log(tmp_path, step=0, steps=[1, 2, 3, 4, 5])
    log(tmp_path, step=3, steps=[4])
    log(tmp_path, step=4, steps=[5, 6])
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    starts = [event.step for event in events(tmp_path) if event.session_log.status]
    assert starts == [1, 4, 5]  # TensorBoard ignores what an earlier process logged from these steps on
    log(tmp_path, step=0, steps=[1])  # after a run that ended before its first checkpoint
    assert [line['step'] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize(
    'torn',
    [
        '[' * 100_000 + '\n',
        '{"step": 3, "lo',
        '{',
        '{"step": 3, "loss": 0.25',
        '{"step": 3, "loss": 0.25}',
        '{"step": 1e999, "loss": 0.25}\n',
        '\0\0\0',
    ],
)
def test_a_torn_last_line_does_no_harm(tmp_path, torn):
    log(tmp_path, step=0, steps=[1, 2])
    with open(tmp_path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(torn)
    log(tmp_path, step=3, steps=[4])
    assert [line['step'] for line in lines(tmp_path) if line['step'] != 3] == [1, 2, 4]


def test_an_image_is_logged(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    with Writer(str(tmp_path), step=0) as writer:
        writer.image(7, 'samples', image)
    (value,) = (value for event in events(tmp_path) for value in event.summary.value)
    assert value.tag == 'samples' and (value.image.height, value.image.width) == (4, 6)
    assert value.image.encoded_image_string.startswith(b'\x89PNG')


def test_logs_that_cannot_be_written_are_reported_once(tmp_path):
    (tmp_path / 'logs').write_text('a file where the folder should be')
    messages = []
    with Writer(str(tmp_path / 'logs'), step=0, warn=messages.append) as writer:
        for step in (1, 2):
            writer.scalars(step, loss=0.5)
            writer.image(step, 'samples', np.zeros((4, 4, 3), np.uint8))
    (message,) = messages
    assert str(tmp_path / 'logs') in message


def test_a_pipe_in_place_of_the_log_does_not_block(tmp_path):
    os.mkfifo(tmp_path / 'metrics.jsonl')
    messages = []
    with Writer(str(tmp_path), step=0, warn=messages.append) as writer:
        writer.scalars(1, loss=0.5)
    (message,) = messages
    assert 'not a regular file' in message
