"""Forward and inverse kinematics of the FR3 with the Franka Hand (numpy, float64).

Modified DH (Craig) parameters of the FCI documentation. Frames carry the names of the URDF: ``fr3_link0`` is the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from gsrl_core.deploy.limits import Array

_A = np.array([0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088])
_D = np.array([0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0])
_ALPHA = np.array([0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2])
_FLANGE = 0.107
_FINGER = 0.0584


def _rotated_z(angle: float, z: float = 0.0) -> Array:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec([0.0, 0.0, angle]).as_matrix()
    pose[2, 3] = z
    return pose


FLANGE_FROM_HAND = _rotated_z(-np.pi / 4)
FLANGE_FROM_TCP = _rotated_z(-np.pi / 4, 0.1034)
"""F_T_EE of the Franka Hand: ``fr3_hand_tcp`` in ``fr3_link8``."""


def link_poses(q: Array, fingers: tuple[float, float] = (0.0, 0.0)) -> dict[str, Array]:
    """base_from_link [4, 4] of links 0..8, hand and fingers at joint positions ``q`` [7] (rad), fingers (m)."""
    poses = {"fr3_link0": np.eye(4)}
    pose = np.eye(4)
    for i in range(7):
        c, s, ca, sa = np.cos(q[i]), np.sin(q[i]), np.cos(_ALPHA[i]), np.sin(_ALPHA[i])
        pose = pose @ np.array(
            [
                [c, -s, 0.0, _A[i]],
                [s * ca, c * ca, -sa, -sa * _D[i]],
                [s * sa, c * sa, ca, ca * _D[i]],
                [0.0, 0.0, 0.0, 1.0],
            ]
        )
        poses[f"fr3_link{i + 1}"] = pose
    poses["fr3_link8"] = pose @ _rotated_z(0.0, _FLANGE)
    hand = poses["fr3_link8"] @ FLANGE_FROM_HAND
    poses["fr3_hand"] = hand
    for name, opening, turn in (("fr3_leftfinger", fingers[0], 0.0), ("fr3_rightfinger", fingers[1], np.pi)):
        finger = _rotated_z(turn, _FINGER)
        finger[:3, 3] += finger[:3, 1] * opening
        poses[name] = hand @ finger
    return poses


def tcp_pose(q: Array, flange_from_tcp: Array = FLANGE_FROM_TCP) -> Array:
    """base_from_tcp [4, 4] at joint positions ``q`` [7] (rad)."""
    return link_poses(q)["fr3_link8"] @ flange_from_tcp


def jacobian(q: Array, flange_from_tcp: Array = FLANGE_FROM_TCP) -> Array:
    """Geometric Jacobian [6, 7]: TCP linear (m/s) over angular (rad/s) velocity in the base frame per joint rate."""
    poses = link_poses(q)
    tip = (poses["fr3_link8"] @ flange_from_tcp)[:3, 3]
    columns = []
    for i in range(1, 8):
        axis, origin = poses[f"fr3_link{i}"][:3, 2], poses[f"fr3_link{i}"][:3, 3]
        columns.append(np.concatenate([np.cross(axis, tip - origin), axis]))
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class InverseKinematics:
    """Result of :func:`solve_ik`."""

    q: Array
    """[7] rad."""
    translation_error: float
    """m."""
    rotation_error: float
    """rad."""

    @property
    def converged(self) -> bool:
        """Within 1 mm and 5 mrad."""
        return self.translation_error < 1e-3 and self.rotation_error < 5e-3


def solve_ik(
    base_from_tcp: Array, q_seed: Array, flange_from_tcp: Array = FLANGE_FROM_TCP, *, iterations: int = 30
) -> InverseKinematics:
    """Joint positions near ``q_seed`` [7] that reach ``base_from_tcp`` [4, 4]: damped least squares.

    Buss 2004, "Introduction to inverse kinematics", section 6: dq = J^T (J J^T + lambda^2 I)^-1 e. The solution with
    the least joint motion is what an impedance-controlled arm does too, as long as its null space is at rest.
    """
    q = np.array(q_seed, dtype=float)
    for _ in range(iterations):
        error = pose_error(base_from_tcp, tcp_pose(q, flange_from_tcp))
        if np.linalg.norm(error[:3]) < 1e-6 and np.linalg.norm(error[3:]) < 1e-6:
            break
        J = jacobian(q, flange_from_tcp)
        step = J.T @ np.linalg.solve(J @ J.T + 1e-6 * np.eye(6), error)
        q = q + step * min(1.0, 0.3 / max(np.abs(step).max(), 1e-9))
    error = pose_error(base_from_tcp, tcp_pose(q, flange_from_tcp))
    return InverseKinematics(q, float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:])))


def pose_error(target: Array, pose: Array) -> Array:
    """[6]: translation (m) and rotation vector (rad), both in the base frame, that take ``pose`` to ``target``."""
    turn = Rotation.from_matrix(target[:3, :3]) * Rotation.from_matrix(pose[:3, :3]).inv()
    return np.concatenate([target[:3, 3] - pose[:3, 3], turn.as_rotvec()])
