"""Checkpoints: named trees of arrays at a step, which Orbax writes in the background, completely or not at all."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion.runtime import hosts, memory
from diffusion.util import first_line, json_sha256, read_json, steps_in

T = TypeVar('T')
CHUNK = 2**16  # elements that a checksum reads at a time, so that they fit a core's cache


class DamagedError(Exception):
    """A checkpoint that cannot be used; the message names it and says what was found."""


class OtherArraysError(Exception):
    """An intact checkpoint whose arrays are not those requested; the message names it and some of the arrays."""


class Checkpoints:
    """Context manager for the checkpoints below one folder; on exit it waits for the last write.

    Orbax's own checks miss some damage, such as a flipped bit in an array that is stored uncompressed, or two swapped
    files. Therefore a checkpoint also holds its step, the shape and a checksum of each array, and a digest of all this;
    `restore` verifies them.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int | None = None,
        writing: bool = False,
        written: Callable[[int], object] = lambda step: None,
    ):
        """Open the folder.

        Args:
            directory: the folder, one subfolder per step.
            keep: how many of the newest checkpoints are kept; None for all.
            writing: create the folder, and remove what an interrupted save left in it. Only one process, or the hosts
                of one run, may write at a time.
            written: called with the step of each checkpoint once it is complete, in the thread that wrote it.
        """
        self._written = written
        self.directory = os.path.abspath(directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=writing,
            create=writing,
        )
        types = ((np.ndarray, _NumpyWriter()), (jax.Array, _ArrayReader()))
        registry = ocp.type_handlers.create_type_handler_registry(*types)
        self._trees = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(None, ocp.args.PyTreeSave, self._trees)
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=handlers)
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        self._copies: concurrent.futures.Future | None = None
        self._incomplete: int | None = None  # the step that several hosts are writing

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._background.shutdown()
        # Closing waits for all hosts. After a failed computation, one of them has probably ended.
        if kind is None or jax.process_count() == 1 or not issubclass(kind, jax.errors.JaxRuntimeError):
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, the newest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def path(self, step: int) -> str:
        """Return the folder of a checkpoint."""
        return os.path.join(self.directory, str(step))

    def save(self, step: int, record: dict[str, Any] | None = None, **trees: Any) -> None:
        """Write trees as the checkpoint of a step; returns once they are copied, and continues in the background.

        Args:
            step: replaces a checkpoint of the same step.
            record: JSON that is stored with the trees.
            trees: by name, pytrees of arrays of 16 or 32 bits per element.

        Raises:
            OSError, ValueError: this checkpoint cannot be written, or writing the one before failed. The files of a
                failed write are removed. If one of several hosts fails, all raise.
        """
        with self._on_all_hosts():
            self._wait()
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
        if jax.process_count() == 1:
            self._writing = self._background.submit(self._write, step, record, self._copy(trees))
        else:  # not in the background: hosts wait for each other here, and must do so in the same order everywhere
            self._write(step, record, trees)

    def reserve(self, **trees: Any) -> None:
        """Allocate memory for copies of the trees in the background, so that the first `save` need not."""
        if jax.process_count() == 1:
            self._copies = self._allocate(trees)

    def _allocate(self, trees: dict[str, Any]) -> concurrent.futures.Future:
        return self._background.submit(jax.tree.map, lambda leaf: np.ones(leaf.shape, leaf.dtype), trees)

    def _copy(self, trees: dict[str, Any]) -> dict[str, Any]:
        """Copy trees to the host, because the next step reuses their buffers."""
        self._copies = self._copies or self._allocate(trees)
        copies = self._copies.result()
        for leaf in jax.tree.leaves(trees):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()  # start all transfers before waiting for the first
        jax.tree.map(np.copyto, copies, trees)
        return copies

    @property
    def failed(self) -> bool:
        """Whether the last write is known to have failed, so that `wait` and `save` will raise."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait for the last write.

        Raises:
            OSError, ValueError: it failed, on any host.
        """
        with self._on_all_hosts():
            self._wait()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        incomplete, self._incomplete = self._incomplete, None
        if incomplete is not None:
            self._written(incomplete)

    def _check_room(self, nbytes: int) -> None:
        """Raise OSError if the disk has no room, before TensorStore runs out of it array by array."""
        os.makedirs(self.directory, exist_ok=True)
        need, free = 1.3 * nbytes + 2e6, shutil.disk_usage(self.directory).free
        if need > free:
            raise OSError(f'it takes {need / 1e6:.1f} MB, but {self.directory} has {free / 1e6:.1f} MB left')

    def _write(self, step: int, record: dict[str, Any] | None, trees: dict[str, Any]) -> None:
        sums = {name: checksums(tree) for name, tree in trees.items()}
        shapes = {name: _shapes(tree) for name, tree in trees.items()}
        about = {'step': int(step), 'checksums': sums, 'shapes': shapes, 'record': record or {}}
        about['sha256'] = _sha256(about)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        with self._on_all_hosts():
            self._manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items), force=True)
            if jax.process_count() == 1:
                self._manager.wait_until_finished()
                self._written(step)
            else:
                self._incomplete = step

    @contextlib.contextmanager
    def _on_all_hosts(self) -> Iterator[None]:
        """If the context fails on one host, raise on all, and remove what the failed write left."""
        failure = None
        try:
            yield
        except jax.errors.JaxRuntimeError:  # another host has ended, and `any_host` would wait for it
            raise
        except Exception as error:
            failure = error
        if hosts.any_host(failure is not None):
            self._remove_unfinished()
            raise failure or OSError('another host could not write its part')

    def _remove_unfinished(self) -> None:
        if hosts.is_first() and os.path.isdir(self.directory):
            for name in os.listdir(self.directory):
                if name.endswith('.orbax-checkpoint-tmp'):
                    shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)

    def restore(
        self,
        step: int,
        accept: Callable[[int, dict[str, Any]], object] = lambda step, record: None,
        *,
        optional: Sequence[str] = (),
        **trees: Any,
    ) -> tuple[Any, ...]:
        """Read trees of a checkpoint. Trees that are not named are not read.

        Args:
            step: of the checkpoint.
            accept: called with the step and the record that was saved with it, before arrays are read. It raises
                DamagedError if the record is damaged, and anything else to refuse the checkpoint.
            optional: names of trees that the checkpoint may lack.
            trees: by name, pytrees of ShapeDtypeStructs, whose shardings place the restored arrays.

        Returns:
            The restored trees, in the order of the arguments; None for one that the checkpoint lacks.

        Raises:
            DamagedError: the checkpoint is not what was written. If one of several hosts finds that, all raise.
            OtherArraysError: the arrays that it holds are not those requested.
        """
        with self._intact(step):
            require_regular(self.path(step))
            about = read_about(self.path(step))
            names, absent = list(trees), {name for name in optional if name not in about['checksums']}
        accept(step, about['record'])
        trees = {name: tree for name, tree in trees.items() if name not in absent}
        self._require_arrays(step, about.get('shapes', {}), trees)
        with self._intact(step):
            folder = epath.Path(self.path(step))
            restored = {
                name: self._trees.restore(
                    folder / name,
                    args=ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree)),
                )
                for name, tree in trees.items()
            }
        sums = {name: checksums(tree) for name, tree in restored.items()}
        with self._intact(step):
            if about['step'] != step:
                raise ValueError(f'it holds step {about["step"]}')
            for name, found in sums.items():
                written = about['checksums'][name]
                wrong = sorted(path for path in found.keys() | written.keys() if found.get(path) != written.get(path))
                if wrong:
                    raise ValueError(
                        f'the checksums of {len(wrong)} arrays differ from those written; the first is {name}{wrong[0]}'
                    )
        return tuple(restored.get(name) for name in names)

    def _require_arrays(self, step: int, shapes: dict[str, dict[str, list[int]]], trees: dict[str, Any]) -> None:
        """Raise OtherArraysError unless the checkpoint holds arrays of the requested shapes."""
        for name, tree in trees.items():
            asked, there = _shapes(tree), shapes.get(name, _shapes(tree))
            wrong = [path for path in {**there, **asked} if asked.get(path) != there.get(path)]
            if wrong:
                first = '; '.join(
                    f'{name}{path} is {there.get(path, "missing")} there, {asked.get(path, "missing")} here'
                    for path in wrong[:3]
                )
                raise OtherArraysError(
                    f'{self.path(step)} holds another network or optimizer: {len(wrong)} arrays differ ({first})'
                )

    @contextlib.contextmanager
    def _intact(self, step: int) -> Iterator[None]:
        """Turn any exception in the context but lack of memory, on any host, into a DamagedError on all of them."""
        failure = None
        try:
            yield
        except Exception as error:  # Orbax, TensorStore, JSON and the file system each raise their own for damage
            if memory.exhausted(error):
                raise
            failure = error
        if hosts.any_host(failure is not None):
            failure = failure or OSError('another host cannot read it')
            raise DamagedError(
                f'{self.path(step)} is damaged ({type(failure).__name__}: {first_line(failure, 400)})'
            ) from failure

    def restore_newest(
        self,
        warn: Callable[[str], object],
        accept: Callable[[int, dict[str, Any]], object] = lambda step, record: None,
        *,
        optional: Sequence[str] = (),
        **trees: Any,
    ) -> tuple[int, tuple[Any, ...]] | None:
        """Read trees of the newest checkpoint that is intact.

        Args:
            warn: called with a message for each damaged checkpoint that is skipped.
            accept, optional, trees: as for `restore`.

        Returns:
            The step and the restored trees, or None if there is no checkpoint at all.

        Raises:
            DamagedError: all checkpoints are damaged, or the hosts do not see the same ones.
            OtherArraysError: the arrays of the newest intact one are not those requested.
        """
        messages, steps = [], self.steps()
        if any(seen != steps for seen in hosts.gather(steps)):
            raise DamagedError(f'the hosts do not see the same checkpoints in {self.directory}: is the folder shared?')
        for step in steps:
            try:
                found = self.restore(step, accept, optional=optional, **trees)
            except DamagedError as error:
                messages.append(str(error))
                continue
            for message in messages:
                warn(f'{message}; using the checkpoint of step {step}')
            return step, found
        if messages:
            raise DamagedError(
                'there is no intact checkpoint: restore one from a copy, or start again in another --workdir\n    '
                + '\n    '.join(messages)
            )
        return None

    def put_aside(self, newest: int) -> None:
        """Rename the checkpoints beyond step `newest` to damaged-<step>: training will repeat these steps."""
        with self._on_all_hosts():
            for step in self.steps() if hosts.is_first() else ():
                if step > newest:
                    target = os.path.join(os.path.dirname(self.directory), f'damaged-{step}')
                    while os.path.exists(target):
                        target += '-again'
                    os.rename(self.path(step), target)
        self._manager.reload()


def newest_record(directory: str) -> dict[str, Any]:
    """Return the record of the newest checkpoint below a folder whose record can be read; {} if there is none.

    Unlike `Checkpoints.restore` it reads no arrays, and hosts need not call it together.
    """
    for step in steps_in(directory):
        with contextlib.suppress(OSError, ValueError):
            return read_about(os.path.join(directory, str(step)))['record']
    return {}


def read_about(checkpoint: str) -> dict[str, Any]:
    """Return the description that a checkpoint holds of itself: its step, checksums, shapes and record.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else, or was changed since it was written.
    """
    about = read_json(os.path.join(checkpoint, 'about', 'metadata'))  # where Orbax's JsonSave puts it
    shapes = about.get('shapes', {}) if isinstance(about, dict) else None
    parts = [about.get('record'), *shapes.values()] if isinstance(shapes, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError('its folder about/ does not describe a checkpoint')
    written = about.pop('sha256', None)
    if written is not None and written != _sha256(about):  # checkpoints of earlier versions have no digest
        raise ValueError('the description in its folder about/ was changed')
    return about


def _sha256(about: dict[str, Any]) -> str:
    """Return the SHA-256 of a description, which is the same before it is written as JSON and after it is read."""
    return json_sha256(json.loads(json.dumps(about)))  # as it is read: its keys are strings


def require_regular(folder: str) -> None:
    """Raise OSError if anything below a folder is neither a folder nor a regular file: reading a pipe would block."""
    for parent, _, files in os.walk(folder):
        for name in files:
            if not stat.S_ISREG(os.stat(os.path.join(parent, name)).st_mode):
                raise OSError(f'{os.path.join(parent, name)} is not a regular file')


class _ArrayReader(ocp.type_handlers.ArrayHandler):
    """Reads arrays as Orbax does, but completes the other reads before it raises, see `_complete`."""

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
        return await _complete(super().deserialize(infos, args))


class _NumpyWriter(ocp.type_handlers.NumpyHandler):
    """Writes arrays as Orbax does, but completes the other writes before it raises, see `_complete`."""

    async def _background_serialize(self, *args: Any) -> None:
        await _complete(super()._background_serialize(*args))


async def _complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine; if it fails, wait for the tasks that it started before raising.

    Orbax closes its event loop at the first error. Each other read or write would then print an exception of its own,
    from TensorStore's threads or when it is garbage-collected.
    """
    before = asyncio.all_tasks()
    try:
        return await coroutine
    except Exception:
        while unfinished := asyncio.all_tasks() - before:
            await asyncio.wait(unfinished)
        raise


def checksums(tree: Any) -> dict[str, int]:
    """Return Σ_i w_i·mix(bits(x_i)) mod 2³² with odd weights w_i = 2·mix(i) + 1, for each array of a tree.

    It does not depend on how an array is split over devices and hosts: each sums its own part. `mix` is one-to-one, so
    any change of a single element changes the sum; other damage goes unnoticed as rarely as with any 32-bit hash. All
    hosts must call it.

    Args:
        tree: arrays of 16 or 32 bits per element.

    Returns:
        {path of the array in the tree: checksum}.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = hosts.sum_over_hosts(np.array([_sum(leaf) for _, leaf in leaves], np.uint32))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def _shapes(tree: Any) -> dict[str, list[int]]:
    """{path of an array in the tree: its shape}."""
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _sum(array: np.ndarray | jax.Array) -> int:
    """Sum over the parts of an array that this host holds; a replicated part is counted by one host only."""
    if isinstance(array, np.ndarray):
        parts = [(array, array.ndim * [0])]
    else:
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        parts = [(np.asarray(shard.data), [index.start or 0 for index in shard.index]) for shard in shards]
    total = 0
    for part, start in parts:
        part, shape, start = np.atleast_1d(part), array.shape or (1,), start or [0]
        rows = max(1, CHUNK // max(1, part[0].size)) if len(part) else 1
        for row in range(0, len(part), rows):
            chunk = part[row : row + rows]
            index = np.zeros((), np.uint32)  # of each element, in the flattened whole array
            for size, length, first in zip(shape, chunk.shape, [start[0] + row, *start[1:]], strict=True):
                positions = np.arange(first, first + length).astype(np.uint32)
                index = index[..., None] * np.uint32(size) + positions
            bits = chunk.view({2: np.uint16, 4: np.uint32}[chunk.dtype.itemsize]).astype(np.uint32)
            total += int(np.sum(_mix(bits) * (2 * _mix(index) + 1), dtype=np.uint32))
    return total % 2**32


def _mix(x: np.ndarray) -> np.ndarray:
    """Permute the 32-bit integers without visible patterns, as a hash does."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
