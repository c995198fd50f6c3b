"""Many hosts: the same program runs on each, and JAX's distributed runtime connects them."""

import contextlib
import faulthandler
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the hosts' key-value store has no public interface
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion.runtime.interrupt import EXIT_STATUS
from diffusion.runtime.mesh import put, replicated, split_batch
from diffusion.util import PATIENCE, Output, first_line, say_here

MIN_TIMEOUT = 60  # seconds: hosts rarely start at the same moment, and importing JAX takes a while on each
DETERMINISTIC = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')  # errors that another start would repeat
STATUS = re.compile('[A-Z]{2,}(_[A-Z]+)*: ')  # with which XLA's messages begin
FAILED = 'diffusion/failed'  # the key in JAX's coordination service under which a failing host leaves its message
POLL = 1.0  # seconds between two reads of the key
AGAIN = 'the same command on all hosts tries again'
ALONE = 'if there is only this process, use --config.distributed.detect=False'


_ending = threading.Event()  # this process is about to end with status 1, see `end_all`


class NotMetError(Exception):
    """The processes of a run did not find each other; another start may succeed."""


def connect(*, coordinator: str, num_processes: int, process_id: int, detect: bool, timeout: int) -> None:
    """Connect the processes of a run. Call it before anything uses a device.

    It waits for process 0 to answer, and then for the other processes, each time for `timeout` seconds but at least
    MIN_TIMEOUT. If the others do not connect, it ends the process with a message and EXIT_STATUS.

    Args:
        coordinator: 'host:port' of process 0. If it is '', JAX finds the other processes, provided `detect` is true.
        num_processes: how many processes there are; 0 without a coordinator.
        process_id: the number of this process, from 0; -1 without a coordinator.
        detect: whether JAX looks for a TPU pod, SLURM, Open MPI or Kubernetes; without one, the process runs alone.
        timeout: seconds without a response after which a process counts as lost.

    Raises:
        ValueError: the first three arguments contradict each other.
        NotMetError: process 0 does not answer, or the detection fails.
    """
    patience = max(timeout, MIN_TIMEOUT)
    options: dict[str, Any] = {}
    missing = f'the processes of this run have not met within {patience} s; {ALONE}'
    if coordinator:
        host, port = _address(coordinator)
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f'coordinator is {coordinator!r}, but num_processes={num_processes} and process_id={process_id}: '
                'every process needs its own process_id, from 0 to num_processes − 1'
            )
        options = {
            'coordinator_address': coordinator,
            'num_processes': num_processes,
            'process_id': process_id,
            'cluster_detection_method': 'deactivate',
        }
        missing = (
            f'the {num_processes} processes of config.distributed.num_processes have not met at '
            f'config.distributed.coordinator={coordinator} within {patience} s: start all of them, with an address at '
            'which each can reach process 0'
        )
        say_here(f'process {process_id}: waiting for {num_processes} processes at {coordinator} …')
        if process_id:
            _wait_for(host, port, patience)
    elif (num_processes, process_id) != (0, -1):
        raise ValueError('num_processes and process_id need a coordinator: host:port of process 0')
    elif not detect:
        return
    tracing = faulthandler.is_enabled()
    # JAX aborts a process whose peers are gone, with a message. faulthandler would add a stack trace of each thread.
    faulthandler.disable()
    try:
        with _exit_after(patience, f'{missing}; {AGAIN}'):
            # JAX's own timeout must come later, because it aborts the process with a C++ stack trace.
            options |= {'heartbeat_timeout_seconds': timeout, 'initialization_timeout': 3 * patience}
            jax.distributed.initialize(**options)
    except Exception as error:
        no_cluster = isinstance(error, ValueError) and 'coordinator_address' in str(error)
        if no_cluster and not coordinator:
            if tracing:
                faulthandler.enable()
            return
        reason = f'{error}: {first_line(error.__cause__)}' if error.__cause__ else first_line(error)
        raise NotMetError(f'the processes of this run do not meet ({reason}); {AGAIN}; {ALONE}') from error
    _watch_failures()


def _address(coordinator: str) -> tuple[str, int]:
    """Split 'host:port'."""
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f'coordinator is {coordinator!r}, but must be host:port of process 0, such as 10.0.0.1:9911')
    return host.strip('[]'), int(port)  # IPv6 addresses are written in brackets


def _wait_for(host: str, port: int, seconds: float) -> None:
    """Return once a TCP connection succeeds. Raises NotMetError if none does within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:  # including a name that cannot be resolved yet
            if time.monotonic() > deadline:
                raise NotMetError(
                    f'nothing answers at config.distributed.coordinator={host}:{port} within {seconds} s ({error}): '
                    f'it must be the address of process 0, and process 0 must be running; {AGAIN}'
                ) from error
        time.sleep(0.5)


@contextlib.contextmanager
def _exit_after(seconds: float, message: str) -> Iterator[None]:
    """End the process if the context takes longer: JAX's initialization cannot be interrupted from Python."""

    def end() -> None:
        Output(sys.stderr, PATIENCE).write(f'error: {message}\n')
        os._exit(EXIT_STATUS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lost(error: BaseException) -> str | None:
    """Return a message if an exception most likely means that another host failed or never came, else None."""
    if isinstance(error, NotMetError):
        return str(error)
    while _ending.is_set():  # another thread ends this process, with the status of the host that failed
        time.sleep(POLL)
    # JAX raises some of XLA's failures, Gloo's among them, as ValueError.
    of_xla = isinstance(error, ValueError) and STATUS.match(str(error)) is not None
    if not (of_xla or isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError))) or jax.process_count() == 1:
        return None
    if str(error).startswith(DETERMINISTIC):
        return None
    return (
        f'process {jax.process_index()} of {jax.process_count()} cannot continue, most likely because another host '
        f'failed ({first_line(error)}); the same command on all hosts continues from the last checkpoint'
    )


def _watch_failures() -> None:
    """End this process with status 1 once another host has called `end_all`."""
    service: Any = distributed.global_state.client

    def watch() -> None:
        while not _ending.wait(POLL):
            try:
                message = service.key_value_try_get(FAILED)
            except Exception as error:
                if 'NOT_FOUND' in str(error):
                    continue
                return  # the service has ended
            if not _ending.is_set():
                _ending.set()
                Output(sys.stderr, PATIENCE).write(f'\nerror: {message}\n')
                _end()

    threading.Thread(target=watch, daemon=True).start()


def end_all(message: str) -> None:
    """End the processes of all hosts with status 1, because another start would fail in the same way.

    Otherwise the other hosts would wait for this one, and then end with the status that asks for another start. If
    there is only one host, it returns.

    Args:
        message: printed by the other hosts.
    """
    state: Any = distributed.global_state
    if not jax.distributed.is_initialized() or state.num_processes == 1:
        return
    _ending.set()
    with contextlib.suppress(Exception):  # another host was faster, or the service has ended
        state.client.key_value_set(FAILED, f'process {state.process_id}: {message}')
    _end()


def _end() -> None:
    """End this process with status 1 once all hosts have read the message; process 0, which serves it, ends last."""
    time.sleep(2 * POLL if distributed.global_state.process_id else 4 * POLL)
    os._exit(1)


def is_first() -> bool:
    """Return whether this is the first host, the one that writes logs and pictures."""
    return jax.process_index() == 0


def any_host(flag: bool) -> bool:
    """Return whether `flag` is true on any host. All hosts must call it, and wait for each other."""
    return bool(sum_over_hosts(np.array([bool(flag)], np.uint32))[0])


def sum_over_hosts(array: np.ndarray) -> np.ndarray:
    """Return the sum over hosts of arrays of equal shape. All hosts must call it, and wait for each other."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.process_allgather(array)).sum(0, dtype=array.dtype)


def from_first(array: np.ndarray) -> np.ndarray:
    """Return the first host's array. All hosts must call it, and wait for each other."""
    return array if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(array)


def gather(value: Any) -> list[Any]:
    """Return the JSON value of each host. All hosts must call it, and wait for each other."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    longest = multihost_utils.process_allgather(np.uint32(len(text))).max()
    padded = text.ljust(longest)  # JSON ignores trailing spaces
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))]


def differences(values: Mapping[str, str]) -> dict[str, str]:
    """Compare named texts between hosts. All hosts must call it, wait for each other, and get the same answer.

    Args:
        values: {name: text}.

    Returns:
        {name: what two of the hosts have} for each name whose text is not the same on all hosts.
    """
    if jax.process_count() == 1:
        return {}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    if (digests == digests[0]).all():
        return {}
    hosts = gather(values)
    found = {}
    for name in sorted(set().union(*hosts)):
        texts = [host.get(name, 'nothing') for host in hosts]
        other = next((i for i, value in enumerate(texts) if value != texts[0]), None)
        if other:
            found[name] = f'process 0 has {texts[0]}, process {other} has {texts[other]}'
    return found


class AnyHost:
    """Non-blocking `any` across hosts; returns the previous call's result. A single host gets its own flag at once."""

    def __init__(self, mesh: Mesh):
        self._sharding = split_batch(mesh)
        self._num_local = len(mesh.local_devices)
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))
        self._pending: jax.Array | None = None

    def __call__(self, flag: object) -> bool:
        """Start `any(flag)` over all hosts, and return the result of the previous call (False at the first).

        Args:
            flag: anything with a truth value. All hosts must make the same number of calls.
        """
        if jax.process_count() == 1:
            return bool(flag)
        flags = put(np.full(self._num_local, bool(flag)), self._sharding)
        previous, self._pending = self._pending, self._any(flags)
        return previous is not None and bool(previous)
