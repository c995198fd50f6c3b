"""Many hosts: the same program on each, joined by JAX's own runtime."""

import faulthandler
import os
import sys

import jax

from diffusion.runtime.errors import first_line


def connect(*, coordinator, num_processes, process_id, detect, timeout):
    """Join the processes of this run, before anything touches a device; one process alone needs none of it.

    coordinator: 'host:port' of process 0, with num_processes and this one's process_id; or '', and `detect` lets JAX
    find all three where TPU pods, SLURM, Open MPI or Kubernetes tell them. timeout: seconds after which processes
    that hear nothing of another give up. On all but the first process nothing is printed from here on.
    Raises ValueError where the three do not fit together, or the processes do not meet.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f'coordinator is {coordinator!r}, but num_processes={num_processes} and process_id={process_id} do not '
                'fit: every process needs its own id, from 0 to num_processes − 1'
            )
        how = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
        how['cluster_detection_method'] = 'deactivate'
    elif (num_processes, process_id) != (0, -1):
        raise ValueError('num_processes and process_id need a coordinator, as host:port of process 0')
    elif detect:
        how = {}
    else:
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout, initialization_timeout=max(timeout, 60), **how)
    except ValueError as error:
        if how or 'coordinator_address' not in str(error):
            raise
        return  # no cluster around: a process alone
    except RuntimeError as error:
        raise ValueError(
            f'the processes of this run do not meet ({error}); '
            'if there is only this one, say --config.distributed.detect=False'
        ) from error
    faulthandler.disable()  # JAX ends a process whose peers have gone, and says so: no stack of every thread after it
    if jax.process_index():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 (until the process ends)


def lost(error):
    """A message where an exception most likely means that another host of the run has gone, else None."""
    if jax.process_count() == 1 or not isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)):
        return None
    return (
        f'process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another host '
        f'has gone ({first_line(error)}); the same command on all hosts goes on from the last checkpoint'
    )
