"""Checkpoints of two hosts, one of which fails where the other does not; run by tests/runtime/test_agreement.py.

python -m tests.runtime.two_hosts PORT PROCESS_ID FOLDER
"""

import json
import os
import re
import sys
import time
import traceback

import jax
import numpy as np

from diffusion.runtime import mesh as meshes
from diffusion.runtime.checkpoints import Checkpoints, DamagedError
from diffusion.runtime.hosts import AnyHost, differences
from tests.runtime.common import describe


def fail_once(owner, name, error):
    """Make a method of an object raise the next time it is called."""
    real = getattr(owner, name)

    def fail(*args, **kwargs):
        setattr(owner, name, real)
        raise error

    setattr(owner, name, fail)


def outcome(function, *args, **kwargs):
    """Return what a call returns, or the type of what it raises; of a DamagedError, how its message begins."""
    try:
        return function(*args, **kwargs)
    except (OSError, ValueError) as error:
        return type(error).__name__
    except DamagedError as error:
        return re.split(' in |:', str(error))[0]


def main(port, process_id, folder):
    jax.distributed.initialize(f'127.0.0.1:{port}', 2, process_id, cluster_detection_method='deactivate')
    mesh = meshes.make_mesh()

    def tree(value):
        return {'a': meshes.put_whole(np.full(8, value, np.float32), meshes.split_batch(mesh))}

    described = describe(tree(0))
    seen = {}
    asked = AnyHost(mesh)
    seen['any host'] = [asked(process_id == 1 and call == 1) for call in range(4)]
    seen['differences'] = differences({'same': 'x', 'other': str(process_id)})

    with Checkpoints(os.path.join(folder, 'run', 'checkpoints'), writing=True) as checkpoints:
        checkpoints.save(1, params=tree(1))
        if process_id == 1:
            fail_once(checkpoints._manager, 'check_for_errors', OSError(122, 'Disk quota exceeded'))
        seen['a write that failed on one host'] = outcome(checkpoints.save, 2, params=tree(2))
        checkpoints.save(2, params=tree(2))
        checkpoints.save(3, params=tree(3))
        checkpoints.wait()

        if process_id == 1:
            fail_once(checkpoints._trees, 'restore', OSError(5, 'Input/output error'))
        step, (params,) = checkpoints.restore_newest(lambda message: None, params=described)
        seen['a read that failed on one host'] = [step, float(meshes.gather(params['a']).mean())]

        if process_id == 0:  # the host that renames, on a slow file system
            rename = os.rename
            os.rename = lambda *args: (time.sleep(0.5), rename(*args))
        checkpoints.put_aside(1)
        if process_id == 0:
            os.rename = rename
        seen['put aside'] = checkpoints.steps()
        checkpoints.save(2, params=tree(2))
        checkpoints.wait()
        seen['saved again'] = checkpoints.steps()

    with Checkpoints(os.path.join(folder, f'of host {process_id}'), writing=True) as own:
        os.makedirs(own.path(7 + process_id))
        seen['folders that are not shared'] = outcome(own.restore_newest, print, params=described)
    with Checkpoints(os.path.join(folder, f'also of host {process_id}'), writing=True) as own:
        for step in (2**31 - 1, 2**31 - 2):
            os.makedirs(own.path(step))
        seen['steps whose sum needs more than 32 bits'] = outcome(own.restore_newest, print, params=described)
    print(json.dumps(seen))


if __name__ == '__main__':
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for the other host, which waits for this one
