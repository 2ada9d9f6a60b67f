"""Similarity between two frames from corresponding points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.errors import CaptureError

# Below this ratio of the second to the first principal extent, points lie on a line and one angle is undetermined.
_LINE_RATIO = 1e-4


@dataclass(frozen=True)
class Similarity:
    """``target = scale * rotation @ source + translation``."""

    scale: float
    rotation: Tensor
    """float64 [3, 3]."""
    translation: Tensor
    """float64 [3]."""
    inliers: Tensor
    """bool [N]: the correspondences that the estimate rests on."""

    @property
    def matrix(self) -> Tensor:
        """float64 [4, 4] with ``scale * rotation`` in its upper left."""
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] = self.scale * self.rotation
        matrix[:3, 3] = self.translation
        return matrix

    def apply(self, points: Tensor) -> Tensor:
        """Map source points [..., 3] to the target frame."""
        return self.scale * points.double() @ self.rotation.T + self.translation


def umeyama(source: Tensor, target: Tensor, weights: Tensor | None = None) -> Similarity:
    """Least-squares similarity from ``source`` to ``target`` points [N, 3] (Umeyama 1991, eq. 40-42).

    Raises:
        CaptureError: fewer than three points, or all on a line.
    """
    source, target = source.double(), target.double()
    if source.shape != target.shape or source.ndim != 2 or source.shape[-1] != 3:
        raise CaptureError(f"alignment: shapes {tuple(source.shape)} and {tuple(target.shape)}; need two [N, 3] alike")
    weights = torch.ones(len(source), dtype=torch.float64) if weights is None else weights.double()
    used = weights > 0
    if int(used.sum()) < 3:
        raise CaptureError(
            f"alignment: {int(used.sum())} correspondences; at least 3 that are not on a line are needed"
        )
    weights = weights / weights.sum()
    source_mean, target_mean = weights @ source, weights @ target
    centered_source, centered_target = source - source_mean, target - target_mean
    for centered in (centered_source, centered_target):
        extents = torch.linalg.svdvals(centered[used])
        if extents[1] <= _LINE_RATIO * extents[0]:
            raise CaptureError("alignment: all points lie on one line; spread the tags over the table")
    covariance = (centered_target * weights[:, None]).T @ centered_source
    u, singular, vh = torch.linalg.svd(covariance)
    signs = torch.ones(3, dtype=torch.float64)
    # Without this a mirrored fit would win for noisy or planar points.
    signs[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = u @ torch.diag(signs) @ vh
    variance = (weights[:, None] * centered_source**2).sum()
    scale = float((singular * signs).sum() / variance)
    return Similarity(scale, rotation, target_mean - scale * rotation @ source_mean, used)


def robust_similarity(source: Tensor, target: Tensor, tolerance: float, seed: int = 0, trials: int = 200) -> Similarity:
    """Umeyama on the best consensus: MSAC over triples (Torr and Zisserman 2000), then refits until inliers stay.

    Args:
        source: [N, 3].
        target: [N, 3].
        tolerance: a correspondence is an inlier up to this distance, in target units.
        seed: of the triples.
        trials: number of triples; each is cheap.

    Raises:
        CaptureError: fewer than three correspondences agree with each other.
    """
    source, target = source.double(), target.double()
    best, lowest_cost = torch.zeros(len(source), dtype=torch.bool), float("inf")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trials):
        triple = torch.zeros(len(source), dtype=torch.float64)
        triple[torch.randperm(len(source), generator=generator)[:3]] = 1
        try:
            distances = _distances(umeyama(source, target, triple), source, target)
        except CaptureError:
            continue
        # Truncated squares, not a count: among equally large groups the one that agrees better wins.
        cost = float(distances.clamp(max=tolerance).square().sum())
        if cost < lowest_cost:
            best, lowest_cost = distances <= tolerance, cost
    for _ in range(10):
        estimate = umeyama(source, target, best.double())
        inliers = _distances(estimate, source, target) <= tolerance
        if torch.equal(inliers, best):
            return estimate
        best = inliers
    return umeyama(source, target, best.double())


def _distances(estimate: Similarity, source: Tensor, target: Tensor) -> Tensor:
    return (estimate.apply(source) - target).norm(dim=-1)


def plane_frame(points: Tensor, above: Tensor) -> Tensor:
    """Rigid [4, 4] that moves the plane through ``points`` to z = 0, their centroid to the origin, ``above`` to z > 0.

    The x axis is the old x axis projected on the plane (the old y where that vanishes).

    Args:
        points: [N, 3], not on a line.
        above: [3]: a point on the upper side, for example the mean camera centre.

    Raises:
        CaptureError: fewer than three points, or all on a line.
    """
    points, above = points.double(), above.double()
    if len(points) < 3:
        raise CaptureError(
            f"plane: {len(points)} points given; at least three points that are not on a line are needed"
        )
    origin = points.mean(0)
    _, extents, axes = torch.linalg.svd(points - origin, full_matrices=True)
    if extents[1] <= _LINE_RATIO * extents[0]:
        raise CaptureError("plane: all points lie on one line; at least three points that are not are needed")
    up = axes[2] * torch.sign(axes[2] @ (above - origin))
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    if (x - (x @ up) * up).norm() < 0.1:
        x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    x = torch.nn.functional.normalize(x - (x @ up) * up, dim=0)
    frame = torch.eye(4, dtype=torch.float64)
    frame[:3, :3] = torch.stack([x, torch.linalg.cross(up, x), up])
    frame[:3, 3] = -frame[:3, :3] @ origin
    return frame
