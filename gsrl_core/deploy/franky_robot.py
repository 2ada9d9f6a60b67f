"""The FR3 with the Franka Hand through franky (imported here only)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from scipy.spatial.transform import Rotation

from gsrl_core.deploy.hand import Hand
from gsrl_core.deploy.limits import DDDQ_MAX, DDQ_MAX, RECTANGULAR_DQ_MAX, Array, SafetyLimits, check_joint_tables
from gsrl_core.deploy.robot import READING_PERIOD, RobotState, wait_at_rest
from gsrl_core.deploy.smooth import Setpoint
from gsrl_core.deploy.watchdog import Watchdog
from gsrl_core.errors import SafetyError

_ARRIVED = 5e-3
_HALT_TIMEOUT = 3.0


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
    _lock: Any = field(default_factory=threading.Lock, init=False)
    """Of tracker, clock and wishes to the hand: the loop, the policy's thread and the watchdog use them."""
    _tracker: Any = field(default=None, init=False)
    _watchdog: Watchdog | None = field(default=None, init=False)
    _clock: float = field(default=-1.0, init=False)
    _stamp: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        import franky

        self._franky = franky
        # RuntimeError and ValueError: franky's own checks of arguments.
        self._failures = (franky.Exception, RuntimeError, ValueError)
        config = franky.RealtimeConfig.Enforce if self.realtime else franky.RealtimeConfig.Ignore
        try:
            self._robot = franky.Robot(self.host, realtime_config=config)
            gripper = franky.Gripper(self.host)
            state = self._robot.state
        except Exception as error:
            raise SafetyError(
                f"robot {self.host}: {error}; check the address, that FCI is enabled in Desk, and the network"
            ) from error
        if self._robot.has_errors:
            raise SafetyError(f"robot {self.host} is in an error state ({state.current_errors}); clear it in Desk")
        self.flange_from_tcp = np.array(state.F_T_EE.matrix)
        self.q_range = check_joint_tables(*_urdf_joint_limits(self._robot.model_urdf))
        with self._named("thresholds and limits were refused"):
            self._robot.set_collision_behavior([40.0] * 4 + [20.0] * 3, [2.0 * self.limits.max_force] * 3 + [25.0] * 3)
            self._clamp_dynamics()
            self._hand = Hand(gripper, self.limits, self._failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except SafetyError as closing:
            if error is None:
                raise
            # The reason to leave matters more than what leaving met.
            error.add_note(f"while closing: {closing}")

    def close(self) -> None:
        """Stop arm and hand."""
        try:
            self.stop()
        finally:
            self._hand.close()

    def move_to(self, q: Array, *, check: Callable[[RobotState], None], speed: float = 0.15) -> None:
        """Drive the joints to ``q`` [7] (rad) slowly (``speed``: share of the limits); blocks until there.

        Args:
            q: where to.
            check: is shown every state on the way and stops the arm by raising (monitors, dead-man switch). A watchdog
                stops the arm when it does not return for ``stream_timeout`` of the limits.
            speed: share of the arm's dynamic limits.

        Raises:
            SafetyError: outside the joint range, refused by ``check``, stopped by the watchdog, or the motion was
                aborted.
        """
        if (q < self.q_range[0]).any() or (q > self.q_range[1]).any():
            raise SafetyError(f"start pose {np.round(q, 3).tolist()} is outside the joint range of this arm")
        check(self.read())
        goal = self._franky.JointMotion(self._franky.JointState(list(q)), relative_dynamics_factor=speed)
        try:
            with self._named("the move to the start pose was aborted"):
                self._travel(goal, check)
        except BaseException as error:
            self._halt(error)
            raise
        away = float(np.abs(wait_at_rest(self.read, check).q - q).max())
        if away > _ARRIVED:
            raise SafetyError(f"the arm stopped {away:.3f} rad away from the start pose; check for contact")

    def _travel(self, goal: Any, check: Callable[[RobotState], None]) -> None:
        # The arm goes on by itself: while this thread hangs, nobody would notice a released dead-man switch.
        limit = self.limits.stream_timeout
        stalled = SafetyError(
            f"robot {self.host}: no check of its state for {limit:g} s on its way to the start pose: the watchdog "
            "stopped the arm. Is this computer too busy?"
        )
        watchdog = Watchdog(limit, lambda: self._halt(stalled))
        try:
            with closing(watchdog):
                self._robot.move(goal, asynchronous=True)
                while watchdog.waited is None and not self._robot.join_motion(READING_PERIOD):
                    check(self.read())
                    watchdog.feed()
        except self._failures as error:
            if watchdog.waited is not None:
                raise stalled from error
            raise
        if watchdog.waited is not None:
            raise stalled

    def read(self) -> RobotState:
        """The newest state of the arm and the last known one of the hand; does not wait for the hand.

        Raises:
            SafetyError: the connection to arm or hand is gone, or a command of the hand failed.
        """
        with self._lock:
            with self._named("no state"):
                state = self._robot.state
            clock = state.time.to_sec()
            if clock != self._clock:
                self._clock, self._stamp = clock, time.monotonic()
            stamp, moving = self._stamp, self._tracker is not None
        return RobotState(
            q=np.array(state.q),
            dq=np.array(state.dq),
            base_from_tcp=np.array(state.O_T_EE.matrix),
            wrench=np.array(state.O_F_ext_hat_K),
            width=self._width(),
            stamp=stamp,
            success_rate=float(state.control_command_success_rate) if moving else None,
        )

    def begin(self) -> None:
        """Start the impedance tracker at the current pose, and the watchdog of its stream.

        Raises:
            SafetyError: the arm refused or did not start to follow.
        """
        low, high = self.q_range
        with self._named("refused to follow"):
            self._tracker = self._franky.CartesianImpedanceTracker(
                self._robot,
                translational_stiffness=self.limits.translational_stiffness,
                rotational_stiffness=self.limits.rotational_stiffness,
                translational_error_clip=np.full(3, self.limits.error_clip_translation),
                rotational_error_clip=np.full(3, self.limits.error_clip_rotation),
                posture_task=self._franky.PostureTask(np.array(self._robot.state.q), stiffness=10.0),
                lower_joint_limits=low,
                upper_joint_limits=high,
            )
            deadline = time.monotonic() + 1.0
            while not self._tracker.is_running:
                if time.monotonic() > deadline:
                    raise SafetyError(f"robot {self.host} did not start to follow within 1 s")
                time.sleep(0.005)
        self._watchdog = Watchdog(self.limits.stream_timeout, self._starved)

    def command(self, setpoint: Setpoint) -> None:
        """Stream one target with its velocity.

        Raises:
            SafetyError: control was lost (reflex, user stop, network, stream watchdog); the cause is in the text.
        """
        tracker, watchdog = self._tracker, self._watchdog
        self._check_fed()
        if tracker is None or watchdog is None:
            raise SafetyError("begin() must be called before command()")
        if not tracker.is_running:
            raise SafetyError(f"robot {self.host} left control: {self._cause()}")
        quaternion = Rotation.from_matrix(setpoint.rotation).as_quat()
        with self._named("a setpoint was refused"):
            tracker.set_target(
                self._franky.Affine(setpoint.position, quaternion),
                self._franky.Twist(setpoint.linear, setpoint.angular),
            )
        watchdog.feed()

    def grip(self, width: float) -> None:
        """Move to (opening) or grasp at (closing) a width [m]; a busy hand gets the newest wish when it is free.

        Raises:
            SafetyError: the hand is lost, an earlier command failed, or the stream watchdog stopped arm and hand.
        """
        # One piece: the watchdog withdraws a wish that was let through before it expired, and none comes after.
        with self._lock:
            self._check_fed()
            try:
                self._hand.wish(width)
            except SafetyError as error:
                raise SafetyError(f"robot {self.host}: {error}") from error

    def stop(self) -> None:
        """Halt the hand and end the tracker with a damped stop; what goes wrong is reported after control is given up.

        A wish that the hand has not been sent is withdrawn; an object that it holds stays held.
        """
        watchdog = self._watchdog
        try:
            self._stop_motion()
        finally:
            if watchdog is not None:
                watchdog.close()
                self._watchdog = None

    def _stop_motion(self) -> None:
        with self._lock:
            self._hand.halt()
            tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._named("stopped with"):
                tracker.stop()

    def _starved(self) -> None:
        # In the watchdog's thread: the loop learns of it from command(), and of the arm's state from read().
        with suppress(SafetyError):
            self._stop_motion()

    def _check_fed(self) -> None:
        watchdog = self._watchdog
        if watchdog is not None and watchdog.waited is not None:
            raise SafetyError(
                f"no setpoint for {watchdog.waited:.2f} s (limit {self.limits.stream_timeout:g} s): the stream "
                "watchdog stopped arm and hand. Is this computer too busy?"
            )

    def _halt(self, reason: BaseException) -> None:
        # Smoothly if the motion can still be replaced, else by the arm's own stop.
        self._hand.halt()
        try:
            if self._robot.is_in_control:
                self._robot.move(self._franky.JointStopMotion(), asynchronous=True)
                if not self._robot.join_motion(_HALT_TIMEOUT):
                    self._robot.stop()
        except self._failures as error:
            reason.add_note(f"while stopping: {error}")
            with suppress(*self._failures):
                self._robot.stop()

    def _width(self) -> float:
        try:
            return self._hand.width
        except SafetyError as error:
            raise SafetyError(f"robot {self.host}: {error}") from error

    def _cause(self) -> str:
        try:
            self._robot.join_motion()
        except self._franky.Exception as error:
            return str(error)
        return "no error was reported"

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        # franky's own errors name neither the robot nor what was tried.
        try:
            yield
        except self._failures as error:
            raise SafetyError(f"robot {self.host}: {what} ({error})") from error

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
