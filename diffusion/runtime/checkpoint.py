"""Checkpoints: named trees of arrays at a step, written by Orbax in the background, whole or not at all."""

import concurrent.futures
import contextlib
import functools
import logging
import os
import shutil
import sys
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffusion.runtime import mesh as meshes
from diffusion.runtime.errors import first_line

# Of many tasks that read or write at once one tells what went wrong, by an exception; asyncio would print the others.
logging.getLogger('asyncio').setLevel(logging.CRITICAL + 1)

CHUNK = 2**16  # numbers that are summed at a time, so that they stay in a core's cache


class DamagedError(Exception):
    """A checkpoint that cannot be used; the message names it and says what was found."""


class Checkpoints:
    """The checkpoints below one directory; use as a context manager, which waits for the last write.

    Orbax's own checks let some damage pass (a flipped bit in an array that is stored uncompressed, two files
    that change places). So a checkpoint also holds its step and a checksum of each array, which `restore` compares.
    """

    def __init__(self, directory, *, keep=None, writing=False):
        """keep: how many, the newest ones; writing: for the one who trains, who also clears what was left half done."""
        self.directory = os.path.abspath(directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=writing,
            create=writing,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        # Each host reads by itself, and then they agree: where Orbax lets them meet, one that failed would be missing.
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._writing = self._copies = None

    def __enter__(self):
        _hush()
        return self

    def __exit__(self, kind, *exception):
        self._background.shutdown()
        if kind is None or jax.process_count() == 1 or not issubclass(kind, jax.errors.JaxRuntimeError):
            self._manager.close()  # which waits for all hosts; where a computation failed, one has gone

    def steps(self):
        """The steps of all complete checkpoints, the newest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def path(self, step):
        """Where a checkpoint lies."""
        return os.path.join(self.directory, str(step))

    def save(self, step, record=None, **trees):
        """Write `trees` as checkpoint `step`; returns once they are copied, and writes on in the background.

        record: JSON that is kept with them. Raises OSError or ValueError where that cannot be done, also for what
        went wrong with the one before; what that left half done is removed. Of several hosts, all raise if one does.
        """
        with self._together():
            self._wait()
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
        if jax.process_count() == 1:
            self._writing = self._background.submit(self._write, step, record, self._copy(trees))
        else:  # in which the hosts meet, so that it has its place among all that they do together
            self._write(step, record, trees)

    def reserve(self, **trees):
        """Set memory aside for the copies of `trees`, in the background, so that the first save need not."""
        if jax.process_count() == 1:
            self._copies = self._background.submit(jax.tree.map, lambda leaf: np.ones(leaf.shape, leaf.dtype), trees)

    def _copy(self, trees):
        """What is written: the next step reuses the buffers of `trees`."""
        if self._copies is None:
            self.reserve(**trees)
        copies = self._copies.result()
        for leaf in jax.tree.leaves(trees):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()  # under way, all of them
        jax.tree.map(np.copyto, copies, trees)
        return copies

    @property
    def failed(self):
        """Whether the last write is known to have gone wrong: `wait` and `save` will raise."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self):
        """Wait for the last write. Raises OSError or ValueError, on all hosts, where it went wrong."""
        with self._together():  # clears once more what came after the write had failed
            self._wait()

    def _wait(self):
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _check_room(self, nbytes):
        """Raise OSError where so many bytes cannot be written; before TensorStore finds out, array by array."""
        os.makedirs(self.directory, exist_ok=True)
        need, free = 1.3 * nbytes + 2e6, shutil.disk_usage(self.directory).free
        if need > free:
            raise OSError(f'it takes {need / 1e6:.1f} MB, but {self.directory} has {free / 1e6:.1f} MB left')

    def _write(self, step, record, trees):
        sums = {name: checksums(tree) for name, tree in trees.items()}
        about = {'step': int(step), 'checksums': sums, 'record': record or {}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._together():
            self._manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items), force=True)
            if jax.process_count() == 1:
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _together(self):
        """What fails within on one host fails on all, or some would wait for ever; what is half done is removed."""
        failure = None
        try:
            yield
        except jax.errors.JaxRuntimeError:  # another host has gone: there is none to agree with
            raise
        except Exception as error:
            failure = error
        if meshes.any_host(failure is not None):
            self._clear()
            raise failure or OSError('another host could not write its part')

    def _clear(self):
        """Remove what a save that went wrong has left."""
        if meshes.is_first() and os.path.isdir(self.directory):
            for name in os.listdir(self.directory):
                if name.endswith('.orbax-checkpoint-tmp'):
                    shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)

    def restore(self, step, **trees):
        """Read back the named trees of checkpoint `step`, in the order given.

        Each is described by ShapeDtypeStructs, whose shardings say where the arrays are to lie. Trees
        that are not named are not read. Raises DamagedError, on all hosts, where the checkpoint is not what was
        written.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        with self._intact(step):
            restored = self._reader.restore(
                self.path(step), args=ocp.args.Composite(about=ocp.args.JsonRestore(), **items)
            )
        sums = {name: checksums(restored[name]) for name in trees}
        with self._intact(step):
            about = restored['about']
            if about['step'] != step:
                raise ValueError(f'it holds step {about["step"]}')
            for name, found in sums.items():
                written = about['checksums'][name]
                wrong = sorted(path for path in found.keys() | written.keys() if found.get(path) != written.get(path))
                if wrong:
                    raise ValueError(f'{len(wrong)} arrays are not those that were written: {name}{wrong[0]} …')
        return tuple(restored[name] for name in trees)

    @contextlib.contextmanager
    def _intact(self, step):
        """Whatever goes wrong within, on any host, is a DamagedError on all of them."""
        failure = None
        try:
            yield
        except Exception as error:  # damage shows itself in Orbax, TensorStore, JSON or the file system
            failure = error
        if meshes.any_host(failure is not None):
            failure = failure or OSError('another host cannot read it')
            found = f'{type(failure).__name__}: {first_line(failure, 400)}'
            raise DamagedError(f'{self.path(step)} is damaged ({found})') from failure

    def restore_newest(self, warn, **trees):
        """(step, trees) of the newest checkpoint that is intact, or None where there is none at all.

        Those that are damaged are passed over, each with a call of warn(message). Raises DamagedError where all are,
        and where the hosts do not see the same ones.
        """
        messages, steps = [], self.steps()
        seen = np.array([len(steps), sum(steps)])
        if meshes.any_host(not np.array_equal(seen, meshes.from_first(seen))):
            raise DamagedError(f'the hosts do not see the same checkpoints in {self.directory}: is the folder shared?')
        for step in steps:
            try:
                found = self.restore(step, **trees)
            except DamagedError as error:
                messages.append(str(error))
                continue
            for message in messages:
                warn(f'{message}; going on from the one of step {step}')
            return step, found
        if messages:
            raise DamagedError(
                'there is no intact checkpoint: restore one from a copy, or begin anew in another --workdir\n    '
                + '\n    '.join(messages)
            )
        return None

    def put_aside(self, newest):
        """Rename the checkpoints beyond step `newest` to damaged-<step>: their steps will be done and saved again."""
        with self._together():
            for step in self.steps() if meshes.is_first() else ():
                if step > newest:
                    target = os.path.join(os.path.dirname(self.directory), f'damaged-{step}')
                    while os.path.exists(target):
                        target += '-again'
                    os.rename(self.path(step), target)
        self._manager.reload()


@functools.cache
def _hush():
    """What is no news of a damaged checkpoint, once its first array has told.

    TensorStore tells a loop that asyncio has closed of each further one, and Orbax leaves them without awaiting them.
    """
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    hook, unraisable = sys.excepthook, sys.unraisablehook

    def news(error):
        return str(error) != 'Event loop is closed'

    sys.excepthook = lambda kind, error, traceback: news(error) and hook(kind, error, traceback)
    sys.unraisablehook = lambda event: news(event.exc_value) and unraisable(event)


def checksums(tree):
    """{path: number} of a tree of arrays: Σ_i w_i·mix(bits(x_i)) mod 2³², with odd w_i = 2·mix(i) + 1.

    It does not depend on how the arrays are split over devices and hosts, each of which sums what it has. As `mix` is
    one to one, any change of a single number changes the sum; other damage goes unnoticed as seldom as by any hash.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = meshes.sum_over_hosts(np.array([_sum(leaf) for _, leaf in leaves], np.uint32))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def _sum(array):
    """Of the parts of an array that no other host counts."""
    if isinstance(array, np.ndarray):
        parts = [(array, array.ndim * [0])]
    else:
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        parts = [(np.asarray(shard.data), [places.start or 0 for places in shard.index]) for shard in shards]
    total = 0
    for part, start in parts:
        part, shape, start = np.atleast_1d(part), array.shape or (1,), start or [0]
        rows = max(1, CHUNK // max(1, part[0].size)) if len(part) else 1
        for row in range(0, len(part), rows):
            chunk = part[row : row + rows]
            index = np.zeros((), np.uint32)  # of each place, in the whole array
            for size, length, first in zip(shape, chunk.shape, [start[0] + row, *start[1:]], strict=True):
                places = np.arange(first, first + length).astype(np.uint32)
                index = index[..., None] * np.uint32(size) + places
            bits = chunk.view({2: np.uint16, 4: np.uint32}[chunk.dtype.itemsize]).astype(np.uint32)
            total += int(np.sum(_mix(bits) * (2 * _mix(index) + 1), dtype=np.uint32))
    return total % 2**32


def _mix(x):
    """A one-to-one map of the 32-bit numbers that leaves no pattern: multiplications and shifts, as of a hash."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
