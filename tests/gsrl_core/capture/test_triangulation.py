"""Points from posed pictures: by hand and exact."""

import numpy as np
import pytest

from gsrl_core.capture.triangulation import triangulate, widest_angle


def test_hand_computed_stereo():
    """Two cameras a unit apart along x, f = 100, a point at (0.5, 0, 2): +25 px and -25 px from the centre."""
    K = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    left, right = np.eye(4), np.eye(4)
    right[0, 3] = -1
    point, error = triangulate(np.array([[75.0, 40], [25, 40]]), np.stack([left, right]), np.stack([K, K]))
    np.testing.assert_allclose(point, [0.5, 0, 2], atol=1e-12)
    np.testing.assert_allclose(error, 0, atol=1e-10)
    assert widest_angle(point, np.stack([left, right])) == pytest.approx(2 * np.arctan(0.25))


def test_least_squares_over_many_noisy_views():
    """The result has a smaller reprojection error than any point nearby, the truth included."""
    rng = np.random.default_rng(0)
    truth = np.array([0.3, -0.2, 4.0])
    poses = np.tile(np.eye(4), (8, 1, 1))
    poses[:, :3, 3] = rng.uniform(-1, 1, (8, 3))
    K = np.tile(np.array([[500.0, 0, 320], [0, 480, 240], [0, 0, 1]]), (8, 1, 1))

    def image(point):
        at = np.einsum("nij,nj->ni", K, poses[:, :3, :3] @ point + poses[:, :3, 3])
        return at[:, :2] / at[:, 2:]

    pixels = image(truth) + rng.normal(0, 0.3, (8, 2))
    point, error = triangulate(pixels, poses, K)
    np.testing.assert_allclose(error, image(point) - pixels, atol=1e-9)
    assert np.linalg.norm(point - truth) < 0.02
    cost = (error**2).sum()
    for offset in [truth - point, *(1e-3 * np.concatenate([np.eye(3), -np.eye(3)]))]:
        assert ((image(point + offset) - pixels) ** 2).sum() > cost
