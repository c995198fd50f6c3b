"""Many hosts: the same program on each, joined by JAX's own runtime."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time

import jax

from diffusion.runtime.errors import first_line
from diffusion.runtime.interrupt import EXIT_STATUS

SHORTEST_PATIENCE = 60  # seconds: hosts are seldom started at the same moment, and each imports for a while
AGAIN = 'the same command on all hosts tries again'


class NotMetError(Exception):
    """The processes of a run have not found each other; started again, they may."""


def connect(*, coordinator, num_processes, process_id, detect, timeout):
    """Join the processes of this run, before anything touches a device; one process alone needs none of it.

    coordinator: 'host:port' of process 0, with num_processes and this one's process_id; or '', and `detect` lets JAX
    find all three where TPU pods, SLURM, Open MPI or Kubernetes tell them. timeout: seconds after which processes
    that hear nothing of another give up. Here they wait as long, but 60 s at least, for process 0 to answer, and then
    for the others. On all but the first process nothing is printed once they have met.
    Raises ValueError where the three do not fit together, and NotMetError where what tells them fails or process 0
    does not answer. Where others do not come this process ends at once, with one line and EXIT_STATUS.
    """
    patience = max(timeout, SHORTEST_PATIENCE)
    if coordinator:
        address = _address(coordinator)
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f'coordinator is {coordinator!r}, but num_processes={num_processes} and process_id={process_id} do not '
                'fit: every process needs its own id, from 0 to num_processes − 1'
            )
        how = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
        how['cluster_detection_method'] = 'deactivate'
        print(f'process {process_id}: waiting for {num_processes} processes at {coordinator} …', flush=True)
        if process_id:
            _reach(address, patience)
        missing = (
            f'the {num_processes} processes of config.distributed.num_processes have not met at '
            f'config.distributed.coordinator={coordinator} within {patience} s: start as many, with the address at '
            'which all of them reach process 0'
        )
    elif (num_processes, process_id) != (0, -1):
        raise ValueError('num_processes and process_id need a coordinator, as host:port of process 0')
    elif detect:
        how = {}
        missing = (
            f'the processes of this run have not met within {patience} s; '
            'if there is only this one, say --config.distributed.detect=False'
        )
    else:
        return
    traced = faulthandler.is_enabled()
    faulthandler.disable()  # JAX ends a process whose peers have gone, and says so: no stack of every thread after it
    try:
        with _ending_after(patience, f'{missing}; {AGAIN}'):
            # JAX's own limit ends the process with a stack of C++: it comes too late to be seen
            jax.distributed.initialize(heartbeat_timeout_seconds=timeout, initialization_timeout=3 * patience, **how)
    except Exception as error:
        if not how and isinstance(error, ValueError) and 'coordinator_address' in str(error):
            if traced:
                faulthandler.enable()
            return  # no cluster around: a process alone
        why = f'{error}: {first_line(error.__cause__)}' if error.__cause__ else f'{error}' or type(error).__name__
        raise NotMetError(
            f'the processes of this run do not meet ({why}); {AGAIN}; '
            'if there is only this one, say --config.distributed.detect=False'
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 (until the process ends)


def _address(coordinator):
    """(host, port) of 'host:port'."""
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f'coordinator is {coordinator!r}, but must be host:port of process 0, as 10.0.0.1:9911')
    return host.strip('[]'), int(port)  # an IPv6 address stands in brackets


def _reach(address, patience):
    """Wait until process 0 answers: JAX would not say that nobody does. Raises NotMetError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError as error:  # also a name that is not known yet
            if time.monotonic() > deadline:
                raise NotMetError(
                    f'nobody answers at config.distributed.coordinator={address[0]}:{address[1]} within {patience} s '
                    f'({error}): it has to be the address of process 0, which has to run; {AGAIN}'
                ) from error
        time.sleep(0.5)


@contextlib.contextmanager
def _ending_after(seconds, message):
    """End the process, with one line and EXIT_STATUS, where what is within takes longer: nothing else would stop it."""

    def end():
        print(f'error: {message}', file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lost(error):
    """A message where an exception most likely means that another host has gone or never came, else None."""
    if isinstance(error, NotMetError):
        return str(error)
    if jax.process_count() == 1 or not isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)):
        return None
    return (
        f'process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another host '
        f'has gone ({first_line(error)}); the same command on all hosts goes on from the last checkpoint'
    )
