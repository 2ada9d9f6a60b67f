"""Rotations and rigid transforms. Quaternions are wxyz; vectors are columns; all functions take leading batch axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def quat_to_matrix(quat: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] (wxyz, any non-zero length)."""
    w, x, y, z = torch.nn.functional.normalize(quat, dim=-1).unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        dim=-1,
    ).unflatten(-1, (3, 3))  # fmt: skip


def matrix_to_quat(matrix: Tensor) -> Tensor:
    """Unit quaternions [..., 4] (wxyz, w >= 0) of rotation matrices [..., 3, 3].

    Of the four expressions for the quaternion (Shepperd 1978) the one with the largest divisor is taken, so that the
    result is accurate for every rotation angle.
    """
    m = matrix.flatten(-2).unbind(-1)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = m
    one = torch.ones_like(xx)
    # Row i is 4 * q[i] * q, so its own i-th entry is 4 * q[i]^2.
    candidates = torch.stack(
        [
            torch.stack([one + xx + yy + zz, zy - yz, xz - zx, yx - xy], dim=-1),
            torch.stack([zy - yz, one + xx - yy - zz, yx + xy, zx + xz], dim=-1),
            torch.stack([xz - zx, yx + xy, one - xx + yy - zz, zy + yz], dim=-1),
            torch.stack([yx - xy, zx + xz, zy + yz, one - xx - yy + zz], dim=-1),
        ],
        dim=-2,
    )
    best = torch.diagonal(candidates, dim1=-2, dim2=-1).argmax(dim=-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    quat = torch.nn.functional.normalize(candidates.gather(-2, index).squeeze(-2), dim=-1)
    return torch.where(quat[..., :1] < 0, -quat, quat)


def quat_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product [..., 4] of wxyz quaternions: rotates by ``b`` first, then by ``a``."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def rotvec_to_matrix(rotvec: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3] (axis * angle, rad)."""
    angle = rotvec.norm(dim=-1, keepdim=True)
    # sin(a/2)/a through sinc, which has no singularity at zero.
    half_sinc = 0.5 * torch.sinc(angle / (2 * torch.pi))
    return quat_to_matrix(torch.cat([torch.cos(angle / 2), rotvec * half_sinc], dim=-1))


def matrix_to_rotvec(matrix: Tensor) -> Tensor:
    """Rotation vectors [..., 3] (rad, length in [0, pi]) of rotation matrices [..., 3, 3]."""
    quat = matrix_to_quat(matrix)
    vector = quat[..., 1:]
    sine = vector.norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quat[..., :1])
    # angle / sin(angle / 2) tends to 2 at the identity.
    return vector * torch.where(sine > 1e-8, angle / sine.clamp_min(1e-12), torch.full_like(sine, 2.0))


def euler_xyz_to_matrix(angles: Tensor) -> Tensor:
    """Rotations Rx(a) Ry(b) Rz(c), [..., 3, 3], of angles [..., 3] (rad): the order of ManiSkill's pose deltas."""
    rx, ry, rz = _axis_rotations(angles)
    return rx @ ry @ rz


def matrix_to_euler_xyz(matrix: Tensor) -> Tensor:
    """Angles [..., 3] (rad) with Rx(a) Ry(b) Rz(c) = matrix, b in [-pi/2, pi/2]; c = 0 at b = +-pi/2."""
    b = torch.asin(matrix[..., 0, 2].clamp(-1, 1))
    a = torch.atan2(-matrix[..., 1, 2], matrix[..., 2, 2])
    c = torch.atan2(-matrix[..., 0, 1], matrix[..., 0, 0])
    locked = matrix[..., 0, 2].abs() > 1 - 1e-7
    a_locked = torch.atan2(matrix[..., 2, 1], matrix[..., 1, 1])
    return torch.stack([torch.where(locked, a_locked, a), b, torch.where(locked, torch.zeros_like(c), c)], dim=-1)


def rpy_to_matrix(rpy: Tensor) -> Tensor:
    """Rotations Rz(yaw) Ry(pitch) Rx(roll), [..., 3, 3], of URDF angles [..., 3] (rad)."""
    rx, ry, rz = _axis_rotations(rpy)
    return rz @ ry @ rx


def make_rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """Transforms [..., 4, 4] from rotations [..., 3, 3] and translations [..., 3]; the batch axes broadcast."""
    batch = torch.broadcast_shapes(rotation.shape[:-2], translation.shape[:-1])
    upper = torch.cat([rotation.expand(*batch, 3, 3), translation.expand(*batch, 3)[..., None]], dim=-1)
    bottom = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*batch, 1, 4)
    return torch.cat([upper, bottom], dim=-2)


def rigid_motions(turns: Sequence[np.ndarray], shifts: Sequence[np.ndarray]) -> Tensor:
    """Transforms, float32 [B, 4, 4], from rotation vectors (rad) and translations (m), [3] each.

    One call for a batch: a call for each would cost half a millisecond, 64 times at every reset.
    """
    turn, shift = (torch.from_numpy(np.stack(rows)).float() for rows in (turns, shifts))
    return make_rigid(rotvec_to_matrix(turn), shift)


def rigid_inverse(transform: Tensor) -> Tensor:
    """Inverses [..., 4, 4] of rigid transforms (rotation and translation only, no scale)."""
    rotation = transform[..., :3, :3].transpose(-1, -2)
    return make_rigid(rotation, -(rotation @ transform[..., :3, 3:]).squeeze(-1))


def transform_points(transform: Tensor, points: Tensor) -> Tensor:
    """Points [..., N, 3] moved by transforms [..., 4, 4] (rigid, similar or affine)."""
    return points @ transform[..., :3, :3].transpose(-1, -2) + transform[..., None, :3, 3]


def _axis_rotations(angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = torch.cos(angles), torch.sin(angles)
    one, zero = torch.ones_like(cos[..., 0]), torch.zeros_like(cos[..., 0])

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))

    c, s = cos.unbind(-1), sin.unbind(-1)
    return (
        matrix(one, zero, zero, zero, c[0], -s[0], zero, s[0], c[0]),
        matrix(c[1], zero, s[1], zero, one, zero, -s[1], zero, c[1]),
        matrix(c[2], -s[2], zero, s[2], c[2], zero, zero, zero, one),
    )
