"""The arm: what the loop needs of it, and the FR3 through franky (imported here only)."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from scipy.spatial.transform import Rotation

from gsrl_core.deploy.limits import (
    DDDQ_MAX,
    DDQ_MAX,
    HAND_MAX_WIDTH,
    RECTANGULAR_DQ_MAX,
    Array,
    SafetyLimits,
    check_joint_tables,
)
from gsrl_core.deploy.smooth import Setpoint
from gsrl_core.errors import SafetyError

AT_REST = 0.15
"""Joint speed above which the arm surely moves [rad/s]."""
_ARRIVED = 5e-3
_SETTLED_READINGS = 5
_SETTLE_TIMEOUT = 3.0
_WIDTH_STEP = 0.004
_GRIP_STOP_TIMEOUT = 2.0
# Hands whose last command never ended (connection lost). Freeing one under its running thread crashes the process.
_UNFINISHED: list[Any] = []


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
        """Bring the arm to rest and give up control; safe to call at any time, also twice."""
        ...


@dataclass
class FrankyRobot:
    """An FR3 (or its control-interface emulator) with the Franka Hand, through franky-control 2.

    The arm follows a Cartesian impedance tracker: stiffness and error clips bound the force of a wrong target, and the
    joint repulsion starts at the rectangular limits. franky 2.0.0's wheel reports the Panda's dynamic limits for an
    FR3, so planned motions use the smaller of both sets.

    Raises:
        SafetyError: not reachable, not an FR3, or in an error state.
    """

    host: str
    limits: SafetyLimits
    realtime: bool = True
    """Demand a real-time kernel; off for the emulator."""
    _tracker: Any = field(default=None, init=False)
    _clock: float = field(default=-1.0, init=False)
    _stamp: float = field(default=0.0, init=False)
    _grip_future: Any = field(default=None, init=False)
    _grip_width: float = field(default=-1.0, init=False)

    def __post_init__(self) -> None:
        import franky

        self._franky = franky
        config = franky.RealtimeConfig.Enforce if self.realtime else franky.RealtimeConfig.Ignore
        try:
            self._robot = franky.Robot(self.host, realtime_config=config)
            self._gripper = franky.Gripper(self.host)
            state = self._robot.state
        except Exception as error:
            raise SafetyError(
                f"robot {self.host}: {error}; check the address, that FCI is enabled in Desk, and the network"
            ) from error
        if self._robot.has_errors:
            raise SafetyError(f"robot {self.host} is in an error state ({state.current_errors}); clear it in Desk")
        self.flange_from_tcp = np.array(state.F_T_EE.matrix)
        self.q_range = check_joint_tables(*_urdf_joint_limits(self._robot.model_urdf))
        self._robot.set_collision_behavior([40.0] * 4 + [20.0] * 3, [2.0 * self.limits.max_force] * 3 + [25.0] * 3)
        self._clamp_dynamics()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop arm and hand. A hand that is still busy is stopped first: franky's future refers to it."""
        try:
            self.stop()
        finally:
            if self._grip_future is not None and not self._grip_future.wait(0.0):
                with suppress(self._franky.Exception):
                    self._gripper.stop()
                if not self._grip_future.wait(_GRIP_STOP_TIMEOUT):
                    _UNFINISHED.append((self._gripper, self._grip_future))

    def move_to(self, q: Array, *, speed: float = 0.15) -> None:
        """Drive the joints to ``q`` [7] (rad) slowly (``speed``: share of the limits); blocks until there.

        Raises:
            SafetyError: outside the joint range, or the motion was aborted.
        """
        if (q < self.q_range[0]).any() or (q > self.q_range[1]).any():
            raise SafetyError(f"start pose {np.round(q, 3).tolist()} is outside the joint range of this arm")
        try:
            self._robot.move(self._franky.JointMotion(self._franky.JointState(list(q)), relative_dynamics_factor=speed))
        except self._franky.Exception as error:
            raise SafetyError(f"the move to the start pose was aborted: {error}") from error
        self._wait_at(q)

    def read(self) -> RobotState:
        """The newest state. Raises SafetyError when the connection is gone."""
        try:
            state = self._robot.state
            width = float(self._gripper.width)
        except self._franky.Exception as error:
            raise SafetyError(f"robot {self.host}: no state ({error})") from error
        clock = state.time.to_sec()
        if clock != self._clock:
            self._clock, self._stamp = clock, time.monotonic()
        moving = self._tracker is not None
        return RobotState(
            q=np.array(state.q),
            dq=np.array(state.dq),
            base_from_tcp=np.array(state.O_T_EE.matrix),
            wrench=np.array(state.O_F_ext_hat_K),
            width=width,
            stamp=self._stamp,
            success_rate=float(state.control_command_success_rate) if moving else None,
        )

    def begin(self) -> None:
        """Start the impedance tracker at the current pose."""
        low, high = self.q_range
        state = self._robot.state
        self._tracker = self._franky.CartesianImpedanceTracker(
            self._robot,
            translational_stiffness=self.limits.translational_stiffness,
            rotational_stiffness=self.limits.rotational_stiffness,
            translational_error_clip=np.full(3, self.limits.max_tracking_error),
            rotational_error_clip=np.full(3, self.limits.max_tracking_turn),
            posture_task=self._franky.PostureTask(np.array(state.q), stiffness=10.0),
            lower_joint_limits=low,
            upper_joint_limits=high,
        )
        deadline = time.monotonic() + 1.0
        while not self._tracker.is_running:
            if time.monotonic() > deadline:
                raise SafetyError(f"robot {self.host} did not start to follow within 1 s")
            time.sleep(0.005)

    def command(self, setpoint: Setpoint) -> None:
        """Stream one target with its velocity.

        Raises:
            SafetyError: control was lost (reflex, user stop, network); the cause is in the text.
        """
        if self._tracker is None:
            raise SafetyError("begin() must be called before command()")
        if not self._tracker.is_running:
            raise SafetyError(f"robot {self.host} left control: {self._cause()}")
        quaternion = Rotation.from_matrix(setpoint.rotation).as_quat()
        self._tracker.set_target(
            self._franky.Affine(setpoint.position, quaternion),
            self._franky.Twist(setpoint.linear, setpoint.angular),
        )

    def grip(self, width: float) -> None:
        """Move to (opening) or grasp at (closing) a width [m]; a busy hand gets the newest wish when it is free."""
        width = float(np.clip(width, 0.0, HAND_MAX_WIDTH))
        if self._grip_future is not None and not self._grip_future.wait(0.0):
            return
        if abs(width - self._grip_width) < _WIDTH_STEP:
            return
        closing = width < self._gripper.width
        if closing:
            # A wide tolerance: whatever stops the fingers on the way is held with the grasp force.
            self._grip_future = self._gripper.grasp_async(
                width, self.limits.gripper_speed, self.limits.grasp_force, HAND_MAX_WIDTH, HAND_MAX_WIDTH
            )
        else:
            self._grip_future = self._gripper.move_async(width, self.limits.gripper_speed)
        self._grip_width = width

    def stop(self) -> None:
        """End the tracker with a damped stop; errors while stopping are reported after control is given up."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        try:
            tracker.stop()
        except self._franky.Exception as error:
            raise SafetyError(f"robot {self.host}: stopped with {error}") from error

    def _wait_at(self, q: Array) -> None:
        # By position: a speed signal can chatter while the arm stands (the emulator's does, by 0.08 rad/s).
        deadline = time.monotonic() + _SETTLE_TIMEOUT
        arrived = 0
        while arrived < _SETTLED_READINGS:
            away = float(np.abs(self.read().q - q).max())
            arrived = arrived + 1 if away < _ARRIVED else 0
            if time.monotonic() > deadline:
                raise SafetyError(f"the arm stopped {away:.3f} rad away from the start pose; check for contact")
            time.sleep(0.02)

    def _cause(self) -> str:
        try:
            self._robot.join_motion()
        except self._franky.Exception as error:
            return str(error)
        return "no error was reported"

    def _clamp_dynamics(self) -> None:
        wanted = (
            (self._robot.joint_velocity_limit, RECTANGULAR_DQ_MAX),
            (self._robot.joint_acceleration_limit, DDQ_MAX),
            (self._robot.joint_jerk_limit, DDDQ_MAX),
        )
        for limit, fr3 in wanted:
            limit.set(0.99 * np.minimum(fr3, np.array(limit.max)))


def _urdf_joint_limits(urdf: str) -> tuple[Array, Array]:
    import xml.etree.ElementTree as ElementTree

    low, high = [], []
    for joint in ElementTree.fromstring(urdf).iter("joint"):
        limit = joint.find("limit")
        if joint.get("type") == "revolute" and limit is not None:
            low.append(float(limit.get("lower", "nan")))
            high.append(float(limit.get("upper", "nan")))
    return np.array(low[:7]), np.array(high[:7])
