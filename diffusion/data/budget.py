"""A limit on the memory that several threads use together."""

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """Memory that threads share: each waits for its part, and those who come first are served first.

    Args:
        nbytes: of all threads together.
    """

    def __init__(self, nbytes: int):
        self._all = self._free = nbytes
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        """Hold `nbytes` within the context, which must not be nested; more than there is counts as all of it."""
        nbytes = min(nbytes, self._all)
        with self._turn, self._changed:  # only one waits for room, so that many small parts do not starve a large one
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify()
