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

SILENCE = 0.4
"""A width older than this, or than the limits' ``max_state_age`` if that is longer, counts as a lost hand [s]."""
REFUSALS = 3
"""Commands in a row that the hand may end without success before it counts as broken."""
_PERIOD = 0.02
_GRACE = 0.1
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
        self._silence = max(SILENCE, limits.max_state_age)
        self._lock = threading.Condition()
        self._width, self._stamp = float(gripper.width), time.monotonic()
        self._wish: float | None = None
        self._halted = False
        self._problem: str | None = None
        # The thread's own: no other thread reads or writes these while it runs.
        self._asked: float | None = None
        self._future: Any = None
        self._stopper: threading.Thread | None = None
        self._refused = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hand", daemon=True)
        self._thread.start()
        # A thread inside franky while the interpreter ends would abort the process.
        atexit.register(self.close)

    @property
    def width(self) -> float:
        """Opening [m], no older than :data:`SILENCE` says.

        Raises:
            SafetyError: the hand is lost, or a command failed.
        """
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

    def halt(self) -> None:
        """Withdraw the pending wish and have moving fingers stopped; returns at once, never raises.

        The stop is an attempt: libfranka often sends it only when the command under way has ended (its issue 111).
        Fingers that stand are left alone: a hand that is told to stop drops what it holds. The next wish counts again.
        """
        with self._lock:
            self._wish, self._halted = None, True

    def close(self) -> None:
        """Stop a busy hand and end the thread; safe to call twice."""
        atexit.unregister(self.close)
        self._closing.set()
        self._thread.join(_STOP_TIMEOUT)
        if self._stopper is not None:
            self._stopper.join(_STOP_TIMEOUT)
        if self._thread.is_alive() or (self._stopper is not None and self._stopper.is_alive()):
            _UNFINISHED.append(self)
            return
        if self._future is not None and not self._future.wait(0.0):
            with suppress(*self._as_tuple()):
                self._gripper.stop()
            if not self._future.wait(_STOP_TIMEOUT):
                _UNFINISHED.append(self)

    def _check(self) -> None:
        # The hand's thread gets time to catch up: while another one holds the interpreter lock (compilers do, for
        # seconds) it cannot read, which is no fault of the hand.
        if not self._lock.wait_for(self._known, _GRACE):
            self._problem = f"no state for {time.monotonic() - self._stamp:.1f} s"
        if self._problem is not None:
            raise SafetyError(f"the hand: {self._problem}; check it in Desk")

    def _known(self) -> bool:
        return self._problem is not None or time.monotonic() - self._stamp <= self._silence

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                width = float(self._gripper.width)
                with self._lock:
                    self._width, self._stamp = width, time.monotonic()
                    self._lock.notify_all()
                    halted, self._halted = self._halted, False
                if halted:
                    self._stop_fingers()
                self._advance(width)
            except self._failures as error:
                with self._lock:
                    self._problem = f"no state or a failed command ({error})"
                return
            self._closing.wait(_PERIOD)

    def _advance(self, width: float) -> None:
        if self._future is not None:
            if not self._future.wait(0.0) or (self._stopper is not None and self._stopper.is_alive()):
                return
            self._judge()
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

    def _stop_fingers(self) -> None:
        if self._future is None or self._future.wait(0.0) or self._stopper is not None:
            return
        # Forgotten, so that the same wish is sent once more afterwards.
        self._asked = None
        # In a thread of its own: it may take as long as the command under way, and the width must stay current.
        self._stopper = threading.Thread(target=self._stop_gripper, name="hand-stop", daemon=True)
        self._stopper.start()

    def _stop_gripper(self) -> None:
        try:
            self._gripper.stop()
        except self._failures as error:
            with self._lock:
                self._problem = f"it could not be stopped ({error})"

    def _judge(self) -> None:
        future, self._future = self._future, None
        stopper, self._stopper = self._stopper, None
        if stopper is not None:
            # It ends with an error or without success, and neither is the hand's fault.
            with suppress(*self._as_tuple()):
                future.get()
        elif future.get():
            self._refused = 0
        else:
            self._refuse()

    def _refuse(self) -> None:
        # Forgotten, so that the same wish is sent once more.
        asked, self._asked = self._asked, None
        self._refused += 1
        if self._refused >= REFUSALS:
            with self._lock:
                self._problem = f"{self._refused} commands in a row ended without success, the last to {asked:.3f} m"

    def _as_tuple(self) -> tuple[type[Exception], ...]:
        return self._failures if isinstance(self._failures, tuple) else (self._failures,)
