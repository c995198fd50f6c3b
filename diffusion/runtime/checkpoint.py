"""Checkpoints: named trees of arrays at a step, written by Orbax in the background, whole or not at all."""

import os

import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints below one directory; use as a context manager, which waits for the last write."""

    def __init__(self, directory, *, keep):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(os.path.abspath(directory), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    def latest(self):
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step, **trees):
        """Write `trees` as checkpoint `step`; returns once they are copied, and writes on in the background."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step, **trees):
        """Read back the named trees of checkpoint `step`, in the order given.

        Each is described by ShapeDtypeStructs, whose shardings say where the arrays are to lie. Trees
        that are not named are not read.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return tuple(restored[name] for name in trees)
