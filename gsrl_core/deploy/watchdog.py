"""A watchdog thread: acts when it is not fed in time, whatever the thread that should feed it is doing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls ``expired`` once, in its own thread, when :meth:`feed` was not called for ``seconds``.

    It runs in the same interpreter: a library that never releases the interpreter lock would hold it up too.
    """

    def __init__(self, seconds: float, expired: Callable[[], None]) -> None:
        """Start to count now."""
        self._seconds = seconds
        self._expired = expired
        self._fed = time.monotonic()
        self._closed = threading.Event()
        self.waited: float | None = None
        """How long nothing had come when it expired [s]; none: it did not."""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def feed(self) -> None:
        """All is well for another period."""
        self._fed = time.monotonic()

    def close(self) -> None:
        """Stop watching; waits for an action that is under way, unless it is the one that calls."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._seconds / 5.0):
            waited = time.monotonic() - self._fed
            if waited > self._seconds:
                self.waited = waited
                self._expired()
                return
