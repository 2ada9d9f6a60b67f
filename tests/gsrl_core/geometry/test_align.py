"""Similarity estimation: hand-computed cases, exact recovery, outliers, degenerate input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsrl_core.errors import CaptureError
from gsrl_core.geometry.align import plane_frame, robust_similarity, umeyama
from gsrl_core.geometry.rotation import rotvec_to_matrix

SQUARE = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])


def test_hand_computed_quarter_turn():
    """A unit square, turned by +90 degrees about z, doubled and moved by (5, 6, 7)."""
    target = torch.tensor([[5.0, 6, 7], [5, 8, 7], [3, 8, 7], [3, 6, 7]])
    estimate = umeyama(SQUARE, target)
    assert estimate.scale == pytest.approx(2.0, abs=1e-12)
    expected = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(estimate.rotation, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(estimate.translation, torch.tensor([5.0, 6, 7], dtype=torch.float64))
    torch.testing.assert_close(estimate.matrix[:3, :3], 2 * expected, atol=1e-12, rtol=0)


def test_umeyama_paper_example():
    """The worked example of Umeyama 1991, section IV: a reflection would fit better, the answer is a rotation."""
    source = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]])
    target = torch.tensor([[0.0, 0, 0], [-1, 0, 0], [0, 2, 0]])
    estimate = umeyama(source, target)
    assert torch.linalg.det(estimate.rotation) == pytest.approx(1.0)
    # In space (unlike the paper's plane) the mirrored triangle is reached by half a turn about y, exactly.
    assert estimate.scale == pytest.approx(1.0)
    torch.testing.assert_close(estimate.apply(source), target.double(), atol=1e-9, rtol=0)


def test_weights_zero_removes_a_point():
    target = SQUARE.clone()
    target[3] = 50.0
    estimate = umeyama(SQUARE, target, torch.tensor([1.0, 1, 1, 0]))
    torch.testing.assert_close(estimate.matrix, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert estimate.inliers.tolist() == [True, True, True, False]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.booleans())
def test_recovers_any_similarity(seed, scale, planar):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    if planar:
        source[:, 2] = 0
    rotation = rotvec_to_matrix(torch.randn(3, generator=generator, dtype=torch.float64))
    translation = torch.randn(3, generator=generator, dtype=torch.float64)
    estimate = umeyama(source, scale * source @ rotation.T + translation)
    assert estimate.scale == pytest.approx(scale, rel=1e-9)
    torch.testing.assert_close(estimate.rotation, rotation, atol=1e-8, rtol=0)
    torch.testing.assert_close(estimate.translation, translation, atol=1e-8 * max(1, scale), rtol=0)


def test_robust_fit_ignores_gross_errors():
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    rotation = rotvec_to_matrix(torch.tensor([0.2, -1.1, 0.7], dtype=torch.float64))
    target = 0.3 * source @ rotation.T + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    target += 1e-4 * torch.randn(24, 3, generator=generator, dtype=torch.float64)
    target[:8] += torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    assert umeyama(source, target).inliers.all()
    assert (umeyama(source, target).apply(source) - target).norm(dim=-1).max() > 0.1, "the plain fit is pulled away"
    estimate = robust_similarity(source, target, tolerance=0.005)
    assert estimate.inliers.tolist() == [False] * 8 + [True] * 16
    assert estimate.scale == pytest.approx(0.3, rel=1e-3)
    torch.testing.assert_close(estimate.rotation, rotation, atol=1e-3, rtol=0)


@pytest.mark.parametrize("points", [SQUARE[:2], torch.stack([torch.arange(5.0)] * 3, dim=-1), torch.zeros(4, 3)])
def test_degenerate_points_are_refused(points):
    with pytest.raises(CaptureError, match=r"at least 3|one line"):
        umeyama(points, points)


def test_robust_fit_of_unrelated_points_is_refused():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    with pytest.raises(CaptureError, match="correspondences"):
        robust_similarity(source, target, tolerance=1e-9)


def test_shapes_must_agree():
    with pytest.raises(CaptureError, match=r"\(4, 3\) and \(3, 3\)"):
        umeyama(SQUARE, SQUARE[:3])


def test_plane_frame_by_hand():
    """The plane x = 2 seen from x = 5: its normal +x becomes +z and old y (old x vanishes) becomes x."""
    points = torch.tensor([[2.0, 1, 1], [2, 3, 1], [2, 3, 3], [2, 1, 3]])
    frame = plane_frame(points, torch.tensor([5.0, 0, 0]))
    expected = torch.tensor([[0.0, 1, 0, -2], [0, 0, 1, -2], [1, 0, 0, -2], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(frame, expected, atol=1e-12, rtol=0)
    below = plane_frame(points, torch.tensor([-5.0, 0, 0]))
    assert (below @ torch.tensor([-5.0, 0, 0, 1], dtype=torch.float64))[2] > 0
    assert torch.linalg.det(below[:3, :3]) == pytest.approx(1.0)


def test_plane_frame_of_tilted_points_is_rigid():
    normal_tilt = rotvec_to_matrix(torch.tensor([0.3, 0.4, 0.1], dtype=torch.float64))
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0)).double()
    points = torch.cat([grid, torch.zeros(len(grid), 1, dtype=torch.float64)], -1) @ normal_tilt.T
    frame = plane_frame(points, points.mean(0) + normal_tilt[:, 2] * math.pi)
    moved = points @ frame[:3, :3].T + frame[:3, 3]
    assert moved[:, 2].abs().max() < 1e-12
    torch.testing.assert_close(torch.cdist(moved, moved), torch.cdist(points, points))


def test_plane_needs_three_points():
    with pytest.raises(CaptureError, match="three points"):
        plane_frame(SQUARE[:2], torch.ones(3))


def test_of_two_equal_groups_the_exact_one_wins():
    """Three squares; moving one by 0.05 lets it pair with either other within tolerance, but only loosely."""
    squares = [SQUARE * 0.05 + torch.tensor(place) for place in ((0.0, 0, 0), (0.3, 0, 0), (0.1, 0.25, 0))]
    target = torch.cat([squares[0], squares[1], squares[2] + torch.tensor([0.05, 0, 0])])
    estimate = robust_similarity(torch.cat(squares), target, tolerance=0.02)
    assert estimate.inliers.tolist() == [True] * 8 + [False] * 4
    assert estimate.scale == pytest.approx(1.0, abs=1e-6)
