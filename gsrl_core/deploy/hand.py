"""The Franka Hand in a thread of its own: its interface blocks, and a stream of setpoints may not.

Reading the width waits for the hand's next state packet, and a command lasts until the fingers stand. The thread reads,
sends the newest wish when the hand is free, and keeps what went wrong; the control loop only touches stored values.
"""

from __future__ import annotations

import atexit
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np

from gsrl_core.deploy.limits import HAND_MAX_WIDTH, SafetyLimits
from gsrl_core.errors import SafetyError

SILENCE = 2.0
"""A width older than this counts as a lost hand [s]."""
REFUSALS = 3
"""Commands in a row that the hand may end without success before it counts as broken."""
_PERIOD = 0.02
_WIDTH_STEP = 0.004
_STOP_TIMEOUT = 2.0
# Hands whose last command or reading never ended (connection lost). Freeing one under its thread crashes the process.
_UNFINISHED: list[Any] = []


class Hand:
    """A gripper of franky (``width``, ``move_async``, ``grasp_async``, ``stop``); close it after use."""

    def __init__(
        self, gripper: Any, limits: SafetyLimits, failures: type[Exception] | tuple[type[Exception], ...]
    ) -> None:
        """``failures``: the exceptions by which ``gripper`` reports a problem; the first reading may raise one."""
        self._gripper = gripper
        self._limits = limits
        self._failures = failures
        self._lock = threading.Lock()
        self._width, self._stamp = float(gripper.width), time.monotonic()
        self._wish: float | None = None
        self._problem: str | None = None
        # The thread's own: no other thread reads or writes these while it runs.
        self._asked: float | None = None
        self._future: Any = None
        self._refused = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hand", daemon=True)
        self._thread.start()
        # A thread inside franky while the interpreter ends would abort the process.
        atexit.register(self.close)

    @property
    def width(self) -> float:
        """Opening [m], at most :data:`SILENCE` old. Raises SafetyError when the hand is lost or a command failed."""
        with self._lock:
            self._check()
            return self._width

    def wish(self, width: float) -> None:
        """Ask for an opening [m]; a busy hand gets the newest wish when it is free.

        Raises:
            SafetyError: the hand is lost, or an earlier command failed.
        """
        with self._lock:
            self._check()
            self._wish = float(np.clip(width, 0.0, HAND_MAX_WIDTH))

    def close(self) -> None:
        """Stop a busy hand and end the thread; safe to call twice."""
        atexit.unregister(self.close)
        self._closing.set()
        self._thread.join(_STOP_TIMEOUT)
        if self._thread.is_alive():
            _UNFINISHED.append(self)
            return
        if self._future is not None and not self._future.wait(0.0):
            with suppress(*self._as_tuple()):
                self._gripper.stop()
            if not self._future.wait(_STOP_TIMEOUT):
                _UNFINISHED.append(self)

    def _check(self) -> None:
        age = time.monotonic() - self._stamp
        if self._problem is None and age > SILENCE:
            self._problem = f"no state for {age:.1f} s"
        if self._problem is not None:
            raise SafetyError(f"the hand: {self._problem}; check it in Desk")

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                width = float(self._gripper.width)
                with self._lock:
                    self._width, self._stamp = width, time.monotonic()
                self._advance(width)
            except self._failures as error:
                with self._lock:
                    self._problem = f"no state or a failed command ({error})"
                return
            self._closing.wait(_PERIOD)

    def _advance(self, width: float) -> None:
        if self._future is not None:
            if not self._future.wait(0.0):
                return
            future, self._future = self._future, None
            if not future.get():
                self._refuse()
            else:
                self._refused = 0
        with self._lock:
            wish = self._wish
            if self._problem is not None:
                return
        if wish is None or (self._asked is not None and abs(wish - self._asked) < _WIDTH_STEP):
            return
        self._asked = wish
        if wish < width:
            # A wide tolerance: whatever stops the fingers on the way is held with the grasp force.
            self._future = self._gripper.grasp_async(
                wish, self._limits.gripper_speed, self._limits.grasp_force, HAND_MAX_WIDTH, HAND_MAX_WIDTH
            )
        else:
            self._future = self._gripper.move_async(wish, self._limits.gripper_speed)

    def _refuse(self) -> None:
        # Forgotten, so that the same wish is sent once more.
        asked, self._asked = self._asked, None
        self._refused += 1
        if self._refused >= REFUSALS:
            with self._lock:
                self._problem = f"{self._refused} commands in a row ended without success, the last to {asked:.3f} m"

    def _as_tuple(self) -> tuple[type[Exception], ...]:
        return self._failures if isinstance(self._failures, tuple) else (self._failures,)
