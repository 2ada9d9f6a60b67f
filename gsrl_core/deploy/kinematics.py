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


_CA, _SA = np.cos(_ALPHA), np.sin(_ALPHA)
_FIXED = np.zeros((7, 4, 4))
_FIXED[:, 0, 3] = _A
_FIXED[:, 1, 2], _FIXED[:, 1, 3] = -_SA, -_SA * _D
_FIXED[:, 2, 2], _FIXED[:, 2, 3] = _CA, _CA * _D
_FIXED[:, 3, 3] = 1.0

_LINK7_FROM_FLANGE = _rotated_z(0.0, _FLANGE)
FLANGE_FROM_HAND = _rotated_z(-np.pi / 4)
FLANGE_FROM_TCP = _rotated_z(-np.pi / 4, 0.1034)
"""F_T_EE of the Franka Hand: ``fr3_hand_tcp`` in ``fr3_link8``."""


def _corners(low: tuple[float, float, float], high: tuple[float, float, float]) -> Array:
    return np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])


# Collision shapes of the URDF (m): the hand's bounds in its own frame, and the rubber tip and the screw mount of an
# open finger (0.04 m aside). A finger's other two boxes lie within the hull of these. Open, because a tilted hand then
# reaches lowest, and because the fingers may open at any moment.
_HAND_BOX = _corners((-0.0317, -0.1040, -0.0260), (0.0317, 0.1005, 0.0660))
_FINGER_BOXES = np.concatenate(
    [
        _corners((-0.00875, -0.00002, 0.0360), (0.00875, 0.01518, 0.0545)),
        _corners((-0.011, 0.011, 0.001), (0.011, 0.026, 0.021)),
    ]
) + np.array([0.0, 0.04, _FINGER])
HAND_POINTS = np.concatenate([_HAND_BOX, _FINGER_BOXES, _FINGER_BOXES * [-1.0, -1.0, 1.0]])
"""[40, 3] m in ``fr3_hand``: points whose hull holds the hand and its open fingers."""


def hand_reach_down(base_from_tcp_rotation: Array, flange_from_tcp: Array = FLANGE_FROM_TCP) -> float:
    """How far (m) the lowest point of hand and open fingers lies below the TCP, at an orientation [3, 3]."""
    tcp_from_hand = np.linalg.inv(flange_from_tcp) @ FLANGE_FROM_HAND
    points = HAND_POINTS @ tcp_from_hand[:3, :3].T + tcp_from_hand[:3, 3]
    return float(-(points @ base_from_tcp_rotation[2]).min())


def link_poses(q: Array, fingers: tuple[float, float] = (0.0, 0.0)) -> dict[str, Array]:
    """base_from_link [4, 4] of links 0..8, hand and fingers at joint positions ``q`` [7] (rad), fingers (m)."""
    arm = _chain(q)
    poses = {"fr3_link0": np.eye(4), **{f"fr3_link{i + 1}": pose for i, pose in enumerate(arm)}}
    poses["fr3_link8"] = arm[-1] @ _LINK7_FROM_FLANGE
    hand = poses["fr3_link8"] @ FLANGE_FROM_HAND
    poses["fr3_hand"] = hand
    for name, opening, turn in (("fr3_leftfinger", fingers[0], 0.0), ("fr3_rightfinger", fingers[1], np.pi)):
        finger = _rotated_z(turn, _FINGER)
        finger[:3, 3] += finger[:3, 1] * opening
        poses[name] = hand @ finger
    return poses


def tcp_pose(q: Array, flange_from_tcp: Array = FLANGE_FROM_TCP) -> Array:
    """base_from_tcp [4, 4] at joint positions ``q`` [7] (rad)."""
    return _chain(q)[-1] @ _LINK7_FROM_FLANGE @ flange_from_tcp


def jacobian(q: Array, flange_from_tcp: Array = FLANGE_FROM_TCP) -> Array:
    """Geometric Jacobian [6, 7]: TCP linear (m/s) over angular (rad/s) velocity in the base frame per joint rate."""
    return tcp_and_jacobian(q, flange_from_tcp)[1]


def tcp_and_jacobian(q: Array, flange_from_tcp: Array = FLANGE_FROM_TCP) -> tuple[Array, Array]:
    """Both at the price of one."""
    arm = _chain(q)
    pose = arm[-1] @ _LINK7_FROM_FLANGE @ flange_from_tcp
    axes, arms = arm[:, :3, 2], pose[:3, 3] - arm[:, :3, 3]
    return pose, np.concatenate([np.cross(axes, arms).T, axes.T])


def _chain(q: Array) -> Array:
    # base_from_link [7, 4, 4] of links 1..7: products of the Craig transforms.
    c, s = np.cos(q), np.sin(q)
    steps = _FIXED.copy()
    steps[:, 0, 0], steps[:, 0, 1] = c, -s
    steps[:, 1, 0], steps[:, 1, 1] = s * _CA, c * _CA
    steps[:, 2, 0], steps[:, 2, 1] = s * _SA, c * _SA
    for i in range(1, 7):
        steps[i] = steps[i - 1] @ steps[i]
    return steps


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
        pose, J = tcp_and_jacobian(q, flange_from_tcp)
        error = pose_error(base_from_tcp, pose)
        if np.abs(error).max() < 1e-7:
            break
        step = damped_inverse(J) @ error
        q = q + step * min(1.0, 0.3 / max(np.abs(step).max(), 1e-9))
    error = pose_error(base_from_tcp, tcp_pose(q, flange_from_tcp))
    return InverseKinematics(q, float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:])))


def damped_inverse(J: Array) -> Array:
    """J^T (J J^T + lambda^2 I)^-1, [7, 6], with lambda = 1e-3."""
    return np.linalg.solve(J @ J.T + 1e-6 * np.eye(6), J).T


def pose_error(target: Array, pose: Array) -> Array:
    """[6]: translation (m) and rotation vector (rad), both in the base frame, that take ``pose`` to ``target``."""
    turn = target[:3, :3] @ pose[:3, :3].T
    cosine = (turn[0, 0] + turn[1, 1] + turn[2, 2] - 1.0) / 2.0
    axis = 0.5 * np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    sine = float(np.sqrt(axis @ axis))
    if cosine < -0.5:
        vector = Rotation.from_matrix(turn).as_rotvec()  # near half a turn the axis above vanishes
    else:
        vector = axis * (np.arctan2(sine, cosine) / sine) if sine > 1e-9 else axis
    return np.concatenate([target[:3, 3] - pose[:3, 3], vector])
