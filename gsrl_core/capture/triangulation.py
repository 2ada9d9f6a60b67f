"""Points from several posed pictures."""

from __future__ import annotations

import numpy as np


def triangulate(pixels: np.ndarray, world_to_camera: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One point from its images: linear (Hartley and Zisserman, 12.2), then Gauss-Newton on the reprojection.

    Args:
        pixels: [n, 2], n >= 2.
        world_to_camera: [n, 4, 4].
        K: [n, 3, 3].

    Returns:
        The point [3] in the world frame, and the reprojection errors [n, 2] (px).
    """
    rays = np.linalg.solve(K, np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)[..., None])[..., 0]
    rows = rays[:, :2, None] * world_to_camera[:, 2:3] - world_to_camera[:, :2]
    homogeneous = np.linalg.svd(rows.reshape(-1, 4))[2][-1]
    point = homogeneous[:3] / homogeneous[3]
    projection = K @ world_to_camera[:, :3]
    for _ in range(5):
        error, jacobian = _reprojection(point, pixels, projection)
        point = point - np.linalg.lstsq(jacobian.reshape(-1, 3), error.ravel(), rcond=None)[0]
    return point, _reprojection(point, pixels, projection)[0]


def _reprojection(point: np.ndarray, pixels: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors [n, 2] and their derivative by the point [n, 2, 3]."""
    image = projection[..., :3] @ point + projection[..., 3]
    at = image[:, :2] / image[:, 2:]
    jacobian = (projection[:, :2, :3] - at[..., None] * projection[:, 2:, :3]) / image[:, 2:, None]
    return at - pixels, jacobian


def widest_angle(point: np.ndarray, poses: np.ndarray) -> float:
    """Largest angle (rad) at ``point`` [3] between the directions to two of the cameras [n, 4, 4] (world_to_camera)."""
    centers = -np.einsum("nji,nj->ni", poses[:, :3, :3], poses[:, :3, 3])
    toward = (centers - point) / np.linalg.norm(centers - point, axis=-1, keepdims=True)
    return float(np.arccos(np.clip((toward @ toward.T).min(), -1, 1)))
