"""The arm: what the loop needs of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gsrl_core.deploy.limits import Array
from gsrl_core.deploy.smooth import Setpoint
from gsrl_core.errors import SafetyError

REST_TRAVEL = 1e-3
"""Largest change of a joint of an arm at rest over :data:`REST_READINGS` readings [rad]: 0.0125 rad/s."""
REST_READINGS = 5
READING_PERIOD = 0.02
"""Between two readings of a waiting loop [s]."""
_REST_TIMEOUT = 2.0


@dataclass(frozen=True)
class RobotState:
    """One measurement."""

    q: Array
    """Joint positions [7] rad."""
    dq: Array
    """Joint velocities [7] rad/s."""
    base_from_tcp: Array
    """[4, 4]."""
    wrench: Array
    """External force (N) and torque (N m) at the TCP in the base frame, [6]."""
    width: float
    """Opening of the hand [m]."""
    stamp: float
    """``time.monotonic()`` when the robot's own clock last advanced."""
    success_rate: float | None = None
    """Share of control packets that arrived; none when the arm is not in motion."""

    @property
    def fingers(self) -> tuple[float, float]:
        """Left and right finger position [m]."""
        return (self.width / 2.0, self.width / 2.0)

    @property
    def observation(self) -> Array:
        """The policy's state vector [9]: joints (rad), fingers (m)."""
        return np.array([*self.q, *self.fingers])


class Robot(Protocol):
    """An arm with a gripper under Cartesian impedance control."""

    flange_from_tcp: Array
    """F_T_EE [4, 4] as the robot reports it."""
    q_range: tuple[Array, Array]
    """Joint range ([7], [7]) that both the robot and the FR3 tables allow."""

    def read(self) -> RobotState:
        """The newest state."""
        ...

    def begin(self) -> None:
        """Take control at the current pose; from here on the arm follows :meth:`command`."""
        ...

    def command(self, setpoint: Setpoint) -> None:
        """Stream one target."""
        ...

    def grip(self, width: float) -> None:
        """Ask the hand for an opening [m]; returns at once."""
        ...

    def stop(self) -> None:
        """Bring arm and hand to rest and give up control; safe to call at any time, also twice.

        A wish that the hand has not yet begun to fulfil is withdrawn; what it holds stays held.
        """
        ...


def wait_at_rest(
    read: Callable[[], RobotState], check: Callable[[RobotState], None] = lambda state: None
) -> RobotState:
    """Wait until the arm stands, by its joints' displacement: a speed signal may chatter while nothing moves.

    Args:
        read: gives the newest state.
        check: is shown every state and may raise.

    Returns:
        The newest state of the arm at rest.

    Raises:
        SafetyError: it still moves after 2 s, or the state does not advance.
    """
    deadline = time.monotonic() + _REST_TIMEOUT
    readings: list[RobotState] = []
    while True:
        state = read()
        check(state)
        # A reading that was seen before shows no rest, only an old state.
        if not readings or state.stamp != readings[-1].stamp:
            readings = [*readings[1 - REST_READINGS :], state]
        travel = float(np.ptp([reading.q for reading in readings], axis=0).max())
        if len(readings) == REST_READINGS and travel <= REST_TRAVEL:
            return state
        if time.monotonic() > deadline:
            break
        time.sleep(READING_PERIOD)
    if len(readings) < REST_READINGS:
        raise SafetyError(f"the robot state is old: {len(readings)} new states in {_REST_TIMEOUT:g} s; connection lost")
    raise SafetyError(
        f"the arm moves ({travel:.4f} rad in {REST_READINGS} readings, limit {REST_TRAVEL:g}); wait until it stands"
    )
