"""The safety envelope between a policy's actions and the arm.

Order: schema, finiteness and bound, age, per-step clamp, workspace box, preview of hand height and joints,
jerk-limited resampling; monitors run beside it at the streaming rate. A broken chunk or a tripped monitor raises
:class:`SafetyError`, which ends the episode with a controlled stop. Whatever only has to be reduced is reduced and
named in ``Decision.events``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.kinematics import (
    damped_inverse,
    hand_reach_down,
    pose_error,
    solve_ik,
    tcp_and_jacobian,
    tcp_pose,
)
from gsrl_core.deploy.limits import SAFE_Q_MAX, SAFE_Q_MIN, Array, SafetyLimits, velocity_bounds
from gsrl_core.deploy.robot import RobotState
from gsrl_core.deploy.smooth import Plan, Setpoint, plan_to
from gsrl_core.errors import SafetyError

# Of the legal joint speed: the arm resolves its redundancy a little differently from the preview.
_RATE_SHARE = 0.85
_SCALES = (1.0, 0.5, 0.25, 0.0)
# What the preview leaves to a motion that only brakes towards an accepted target, of all that new motion may not use:
# the arm's measured joints drift a little from those of the preview that accepted it.
_BRAKING_MARGIN = 0.01
_BRAKING_RATE_SHARE = 1.0
_HEIGHT_TOLERANCE = 5e-4
_BOUND_TOLERANCE = 0.5


@dataclass(frozen=True)
class Decision:
    """What the arm does in one control step."""

    target: Array
    """base_from_tcp [4, 4] after all reductions; the next action integrates on it."""
    setpoints: tuple[Setpoint, ...]
    """At ``stream_hz``, the first one period after now."""
    width: float
    """Opening of the hand [m]."""
    events: tuple[str, ...]
    """Which rules reduced the action: translation_clamped, rotation_clamped, workspace, table, joints."""


def check_chunk(actions: object, contract: Contract) -> Array:
    """The chunk as float64 [horizon, 7].

    Raises:
        SafetyError: not an array of numbers, wrong shape, a value that is not finite, or a motion half as large again
            as anything that the contract says occurred in training. Such a policy is broken: walking on at the largest
            step in some direction would not be safe, only slow.
    """
    try:
        chunk = np.asarray(actions, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SafetyError(f"the policy sent {type(actions).__name__}, not an array of numbers ({error})") from error
    expected = (contract.horizon, contract.action.dim)
    if chunk.shape != expected:
        raise SafetyError(f"the policy sent a chunk of shape {chunk.shape}, the contract says {expected}; check both")
    if not np.isfinite(chunk).all():
        row, column = np.argwhere(~np.isfinite(chunk))[0]
        raise SafetyError(f"the policy sent {chunk[row, column]} in step {row}, column {column}; nothing was executed")
    # The gripper is not judged: beyond -1 and 1 it saturates at closed and open.
    largest = (1.0 + _BOUND_TOLERANCE) * contract.action.bound
    absurd = np.argwhere(np.abs(chunk[:, :6]) > largest)
    if absurd.size:
        row, column = absurd[0]
        raise SafetyError(
            f"the policy asks for {chunk[row, column]:.3g} {'m' if column < 3 else 'rad'} in step {row}, column "
            f"{column}; training never exceeds {contract.action.bound:g} (tolerance {_BOUND_TOLERANCE:.0%}). Nothing "
            "was executed; check the checkpoint, its norm_stats.json and the units"
        )
    return chunk


def clamp_step(action: Array, limits: SafetyLimits) -> tuple[Array, Rotation, tuple[str, ...]]:
    """Translation [3] (m) and turn of one action, each shortened to its largest step, and the names of what acted."""
    events = []
    translation = np.array(action[:3], dtype=float)
    length = float(np.linalg.norm(translation))
    if length > limits.max_step_translation:
        translation *= limits.max_step_translation / length
        events.append("translation_clamped")
    vector = Rotation.from_euler("XYZ", action[3:6]).as_rotvec()
    angle = float(np.linalg.norm(vector))
    if angle > limits.max_step_rotation:
        vector = vector * (limits.max_step_rotation / angle)
        events.append("rotation_clamped")
    return translation, Rotation.from_rotvec(vector), tuple(events)


def integrate(target: Array, translation: Array, turn: Rotation) -> Array:
    """The next target [4, 4]: p + dp, dR R, both in base axes (root_translation:root_aligned_body_rotation)."""
    moved = np.eye(4)
    moved[:3, 3] = target[:3, 3] + translation
    moved[:3, :3] = (turn * Rotation.from_matrix(target[:3, :3])).as_matrix()
    return moved


def clip_workspace(base_from_tcp: Array, limits: SafetyLimits, flange_from_tcp: Array) -> Array:
    """The nearest TCP position [3] (m) of the workspace at the orientation of a pose [4, 4].

    In z the lower bound holds for the lowest point of the hand and its open fingers.
    """
    low = np.array(limits.workspace_min)
    low[2] += hand_reach_down(base_from_tcp[:3, :3], flange_from_tcp)
    return np.minimum(np.maximum(base_from_tcp[:3, 3], low), limits.workspace_max)


class Envelope:
    """Keeps the last target and the motion that is being streamed; one instance per episode."""

    def __init__(self, limits: SafetyLimits, contract: Contract, q_range: tuple[Array, Array] | None = None) -> None:
        """``q_range``: joint range ([7], [7]) that the robot allows, already intersected with the tables."""
        self.limits = limits
        self.contract = contract
        low, high = q_range or (SAFE_Q_MIN, SAFE_Q_MAX)
        self._q_min, self._q_max = low + limits.joint_margin, high - limits.joint_margin
        self._flange_from_tcp = contract.flange_from_tcp_array
        self._samples_per_step = round(limits.stream_hz / contract.control_hz)
        if abs(self._samples_per_step * contract.control_hz - limits.stream_hz) > 1e-6:
            raise SafetyError(
                f"stream_hz ({limits.stream_hz}) must be a multiple of the control rate ({contract.control_hz} Hz)"
            )
        self.target = np.eye(4)
        self.setpoint = Setpoint.at_rest(self.target)
        self.width = 0.0
        self._over: dict[str, int] = {}

    def start(self, state: RobotState) -> None:
        """Begin at the measured pose of an arm at rest (:func:`gsrl_core.deploy.robot.wait_at_rest`).

        Raises:
            SafetyError: a non-finite state, TCP or fingers outside the workspace, or a joint outside its range.
        """
        if not all(np.isfinite(x).all() for x in (state.q, state.dq, state.base_from_tcp, state.wrench)):
            raise SafetyError("the robot state contains values that are not finite; check the connection")
        position = state.base_from_tcp[:3, 3]
        if not np.array_equal(self._clip(state.base_from_tcp), position):
            lowest = position[2] - hand_reach_down(state.base_from_tcp[:3, :3], self._flange_from_tcp)
            raise SafetyError(
                f"the TCP is at {np.round(position, 3).tolist()} m and the lowest point of the hand at z = "
                f"{lowest:.3f} m, outside the workspace {self.limits.workspace_min} .. {self.limits.workspace_max}; "
                "move the arm inside by hand"
            )
        self._check_joints(state.q)
        if np.linalg.norm(pose_error(tcp_pose(state.q, self._flange_from_tcp), state.base_from_tcp)) > 5e-3:
            raise SafetyError(
                "the TCP pose that the robot reports does not follow from its joints with the package's TCP; "
                "set the end effector in Desk to the Franka Hand"
            )
        self.target = state.base_from_tcp.copy()
        self.setpoint = Setpoint.at_rest(self.target)
        self.width = state.width
        self._over.clear()

    def is_stale(self, observed_at: float, now: float) -> bool:
        """Whether a chunk computed from a picture taken at ``observed_at`` (s) is too old to be started at ``now``."""
        return not 0.0 <= now - observed_at <= self.limits.max_chunk_age

    def step(self, action: Array, state: RobotState) -> Decision:
        """Turn one row of a checked chunk into setpoints for one control period.

        Raises:
            SafetyError: the streamed pose cannot be traced to joint positions, or even braking leaves the limits.
        """
        translation, turn, events = clamp_step(action, self.limits)
        wanted = integrate(self.target, translation, turn)
        if not np.array_equal(self._clip(wanted), wanted[:3, 3]):
            events = (*events, "workspace")
        now = solve_ik(self.setpoint.pose, state.q, self._flange_from_tcp)
        if not now.converged:
            raise SafetyError(
                "no joint positions near the measured ones reach the streamed pose (off by "
                f"{now.translation_error:.4f} m, {now.rotation_error:.4f} rad); the arm is near a singularity or was "
                "pushed away"
            )
        plan, target, reduced_by = self._preview(translation, turn.as_rotvec(), now.q)
        self.width = self.contract.action.width(float(action[6]))
        return self._decide(plan, target, (*events, *reduced_by))

    def hold(self) -> Setpoint:
        """The next setpoint (one streaming period) towards rest at the last target."""
        self.setpoint = plan_to(self.setpoint, self.target, self.limits).at(1.0 / self.limits.stream_hz)
        return self.setpoint

    def monitor(self, state: RobotState, streamed: Setpoint | None, now: float) -> None:
        """Check a measured state against the thresholds; call once per streamed setpoint (none: nothing was streamed).

        Raises:
            SafetyError: a threshold was passed in as many consecutive samples as the limits say, or the state is old.
        """
        limits = self.limits
        age = now - state.stamp
        if age > limits.max_state_age:
            raise SafetyError(f"the robot state is {age:.3f} s old (limit {limits.max_state_age} s): connection lost")
        self._trip("external force [N]", float(np.linalg.norm(state.wrench[:3])), limits.max_force)
        if streamed is not None:
            error = pose_error(streamed.pose, state.base_from_tcp)
            self._trip("tracking error [m]", float(np.linalg.norm(error[:3])), limits.max_tracking_error)
            self._trip("tracking error [rad]", float(np.linalg.norm(error[3:])), limits.max_tracking_turn)
            if state.success_rate is not None:
                self._trip("lost control packets [share]", 1.0 - state.success_rate, 1.0 - limits.min_success_rate)

    def _trip(self, name: str, value: float, threshold: float) -> None:
        # A value that is not finite counts as over: `not (nan <= x)` is true.
        self._over[name] = self._over.get(name, 0) + 1 if not value <= threshold else 0
        if self._over[name] >= self.limits.force_samples:
            raise SafetyError(
                f"{name} was {value:.3f}, above {threshold:g}, in {self._over[name]} consecutive samples; the arm stops"
            )

    def _clip(self, base_from_tcp: Array) -> Array:
        return clip_workspace(base_from_tcp, self.limits, self._flange_from_tcp)

    def _preview(self, translation: Array, turn: Array, q: Array) -> tuple[Plan, Array, tuple[str, ...]]:
        # The largest share of an action whose motion stays legal: its plan, its target and what reduced it.
        reasons: list[str] = []
        for scale in _SCALES:
            target = integrate(self.target, translation * scale, Rotation.from_rotvec(turn * scale))
            target[:3, 3] = self._clip(target)
            # A turn that pushes a finger down lifts the hand; the lift counts as motion.
            if np.linalg.norm(target[:3, 3] - self.target[:3, 3]) > self.limits.max_step_translation * (1 + 1e-9):
                reasons.append("table")
                continue
            plan = plan_to(self.setpoint, target, self.limits)
            reason = self._refusal(plan, q, braking=scale == 0.0)
            if reason is None:
                return plan, target, tuple(dict.fromkeys(reasons))
            reasons.append(reason)
        raise SafetyError(
            f"the arm would leave its limits ({', '.join(dict.fromkeys(reasons))}) even if it only braked; it was "
            "pushed or drifted away from what was planned"
        )

    def _refusal(self, plan: Plan, q: Array, *, braking: bool) -> str | None:
        # The whole motion down to rest is previewed, so that its tail stays legal if no other action follows.
        share = _BRAKING_RATE_SHARE if braking else _RATE_SHARE
        slack = min(_BRAKING_MARGIN, self.limits.joint_margin) if braking else 0.0
        floor = self.limits.workspace_min[2] - _HEIGHT_TOLERANCE * (2.0 if braking else 1.0)
        q = q.copy()
        period = 1.0 / self.limits.stream_hz
        # At least one sample: an arm that stands beyond its limits is refused too.
        for i in range(max(1, int(np.ceil(plan.duration / period)))):
            setpoint = plan.at((i + 1) * period)
            if setpoint.position[2] - hand_reach_down(setpoint.rotation, self._flange_from_tcp) < floor:
                return "table"
            pose, J = tcp_and_jacobian(q, self._flange_from_tcp)
            inverse = damped_inverse(J)
            q += inverse @ pose_error(setpoint.pose, pose)
            rate = inverse @ np.concatenate([setpoint.linear, setpoint.angular])
            low, high = velocity_bounds(q)
            if (q < self._q_min - slack).any() or (q > self._q_max + slack).any():
                return "joints"
            if (rate < share * low).any() or (rate > share * high).any():
                return "joints"
        residual = pose_error(plan.at(plan.duration).pose, tcp_pose(q, self._flange_from_tcp))
        # Negated, so that a preview that diverged to values that are not finite is refused too.
        return None if np.linalg.norm(residual) < 2e-3 else "joints"

    def _check_joints(self, q: Array) -> None:
        outside = np.flatnonzero((q < self._q_min) | (q > self._q_max))
        if outside.size:
            j = int(outside[0])
            raise SafetyError(
                f"joint {j + 1} is at {q[j]:.3f} rad, outside {self._q_min[j]:.3f} .. {self._q_max[j]:.3f}; "
                "guide the arm to the start pose by hand"
            )

    def _decide(self, plan: Plan, target: Array, events: tuple[str, ...]) -> Decision:
        period = 1.0 / self.limits.stream_hz
        setpoints = tuple(plan.at((i + 1) * period) for i in range(self._samples_per_step))
        self.target, self.setpoint = target, setpoints[-1]
        return Decision(target, setpoints, self.width, events)
