"""The dead-man switch: a key of the terminal that is held down; releasing it stops the arm."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from types import TracebackType
from typing import Self

from gsrl_core.errors import SafetyError

GAP = 0.4
"""Longest pause between two repeats of a held key [s]; a release is noticed after this time at the latest."""
ARMING = 5
"""Repeats that arm the switch: one stroke must not move the arm, nor the pause before a keyboard repeats stop it."""
_POLL = 0.05


class HeldKey:
    """The space bar or Enter, held down, as the terminal repeats it (a context manager; restores the terminal)."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Use a terminal (default: standard input). Raises SafetyError when it is none."""
        self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        if not os.isatty(self._descriptor):
            raise SafetyError(
                "the dead-man switch is a key held in a terminal, and standard input is none; start `real2sim2real "
                "deploy` from a terminal, or use --dry-run"
            )
        self._last = -1.0
        self._strokes = 0
        self._closing = False

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor)
        self._thread = threading.Thread(target=self._listen, name="dead-man", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closing = True
        self._thread.join()
        # What the held key still typed must not reach the shell.
        termios.tcflush(self._descriptor, termios.TCIFLUSH)
        termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def __call__(self) -> bool:
        """Whether the key is held: armed, and repeated within the last :data:`GAP` seconds."""
        return self._strokes >= ARMING and time.monotonic() - self._last <= GAP

    def wait(self, timeout: float) -> None:
        """Wait until the key is held. Raises SafetyError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not self():
            if time.monotonic() > deadline:
                raise SafetyError(f"the dead-man switch was not held within {timeout:.0f} s; nothing was moved")
            time.sleep(_POLL)

    def _listen(self) -> None:
        while not self._closing:
            if not select.select([self._descriptor], [], [], _POLL)[0]:
                continue
            try:
                typed = os.read(self._descriptor, 1024)
            except OSError:
                return  # the terminal is gone, and with it the permit
            if not typed:
                return
            if not set(typed) <= {ord(" "), ord("\n"), ord("\r")}:
                self._strokes = 0  # any other key withdraws the permit
                continue
            now = time.monotonic()
            self._strokes = self._strokes + 1 if now - self._last <= GAP else 1
            self._last = now
