"""Jerk-limited Cartesian targets between policy steps (ruckig).

The three base axes are planned independently (no synchronisation). A time-optimal axis that can stop before its target
does not pass it, so positions stay between start, target and the point where full braking ends: inside the workspace
if the targets are. Orientation is planned as a rotation vector about the orientation at which the plan starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ruckig import InputParameter, Result, Ruckig, Synchronization, Trajectory
from scipy.spatial.transform import Rotation

from gsrl_core.deploy.limits import Array, SafetyLimits
from gsrl_core.errors import SafetyError

# Re-anchoring the rotation vector turns its axes a little, and with them the per-axis limits.
_TURN_RESERVE = 0.85


@dataclass(frozen=True)
class Setpoint:
    """A streamed Cartesian target."""

    position: Array
    """[3] m, base frame."""
    rotation: Array
    """[3, 3] base_from_tcp."""
    linear: Array
    """[3] m/s."""
    angular: Array
    """[3] rad/s, base frame."""
    linear_acceleration: Array
    """[3] m/s^2."""
    angular_acceleration: Array
    """[3] rad/s^2."""

    @staticmethod
    def at_rest(base_from_tcp: Array) -> Setpoint:
        """A target that stands still at ``base_from_tcp`` [4, 4]."""
        zero = np.zeros(3)
        return Setpoint(base_from_tcp[:3, 3].copy(), base_from_tcp[:3, :3].copy(), zero, zero, zero, zero)

    @property
    def pose(self) -> Array:
        """base_from_tcp [4, 4]."""
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.rotation, self.position
        return pose


@dataclass(frozen=True)
class Plan:
    """A trajectory from a setpoint to rest at a target pose."""

    start: Setpoint
    trajectory: Trajectory

    @property
    def duration(self) -> float:
        """Seconds until the target is reached."""
        return float(self.trajectory.duration)

    def at(self, seconds: float) -> Setpoint:
        """The setpoint ``seconds`` after the start; at rest on the target after the end."""
        position, velocity, acceleration = (np.array(x) for x in self.trajectory.at_time(seconds))
        phi, phi_rate, phi_acceleration = position[3:], velocity[3:], acceleration[3:]
        J = left_jacobian(phi)
        J_rate = (left_jacobian(phi + 1e-6 * phi_rate) - J) / 1e-6
        return Setpoint(
            position[:3],
            (Rotation.from_rotvec(phi) * Rotation.from_matrix(self.start.rotation)).as_matrix(),
            velocity[:3],
            J @ phi_rate,
            acceleration[:3],
            J @ phi_acceleration + J_rate @ phi_rate,
        )


def plan_to(start: Setpoint, base_from_tcp: Array, limits: SafetyLimits) -> Plan:
    """The fastest motion within the limits of ``limits`` from ``start`` to rest at ``base_from_tcp`` [4, 4].

    Raises:
        SafetyError: no trajectory was found (numbers out of any sensible range).
    """
    turn = Rotation.from_matrix(base_from_tcp[:3, :3]) * Rotation.from_matrix(start.rotation).inv()
    share = 1.0 / np.sqrt(3.0)
    turn_share = _TURN_RESERVE * share
    request = InputParameter(6)
    request.synchronization = Synchronization.No
    request.current_position = [*start.position, 0.0, 0.0, 0.0]
    request.current_velocity = [*start.linear, *start.angular]
    request.current_acceleration = [*start.linear_acceleration, *start.angular_acceleration]
    request.target_position = [*base_from_tcp[:3, 3], *turn.as_rotvec()]
    request.max_velocity = [limits.max_speed * share] * 3 + [limits.max_turn_rate * turn_share] * 3
    request.max_acceleration = [limits.max_acceleration * share] * 3 + [limits.max_turn_acceleration * turn_share] * 3
    request.max_jerk = [limits.max_jerk * share] * 3 + [limits.max_turn_jerk * turn_share] * 3
    trajectory = Trajectory(6)
    result = Ruckig(6).calculate(request, trajectory)
    if result not in (Result.Working, Result.Finished):
        raise SafetyError(
            f"no smooth motion to {np.round(base_from_tcp[:3, 3], 4).tolist()} was found ({result}); stop"
        )
    return Plan(start, trajectory)


def left_jacobian(phi: Array) -> Array:
    """[3, 3] with angular velocity = J(phi) d(phi)/dt for R = exp(phi) R0 (Chirikjian 2012, eq. 10.86)."""
    angle = float(np.linalg.norm(phi))
    K = np.array([[0.0, -phi[2], phi[1]], [phi[2], 0.0, -phi[0]], [-phi[1], phi[0], 0.0]])
    if angle < 1e-4:
        return np.eye(3) + K / 2.0 + K @ K / 6.0
    return np.eye(3) + (1.0 - np.cos(angle)) / angle**2 * K + (angle - np.sin(angle)) / angle**3 * (K @ K)
