import math

import pytest
import torch

from gsrl_core.geometry.rotation import make_rigid, quat_to_matrix, rotvec_to_matrix
from gsrl_core.splat.constants import ALPHA_MAX, EPS2D
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.raster_torch import project, rasterize_reference

K = torch.tensor([[20.0, 0.0, 8.5], [0.0, 20.0, 8.5], [0.0, 0.0, 1.0]])
BLACK = torch.zeros(3)


def single(position=(0.0, 0.0, 2.0), sigma=0.05, opacity=0.6, color=(0.2, 0.5, 0.9)) -> Gaussians:
    return Gaussians(
        means=torch.tensor([position]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        log_scales=torch.full((1, 3), math.log(sigma)),
        logit_opacities=torch.tensor([math.log(opacity / (1 - opacity))]),
        harmonics=colors_to_harmonics(torch.tensor([color])),
    )


def random_gaussians(count: int, degree: int = 3, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        means=normal(count, 3) * 0.3 + torch.tensor([0.0, 0.0, 2.0]),
        quats=normal(count, 4),
        log_scales=normal(count, 3) * 0.4 - 2.5,
        logit_opacities=normal(count),
        harmonics=normal(count, (degree + 1) ** 2, 3) * 0.2,
    )


def draw(gaussians: Gaussians, world_to_camera=None, K=K, size=(17, 17), background=BLACK):
    pose = torch.eye(4) if world_to_camera is None else world_to_camera
    return rasterize_reference(*gaussians.tensors(), pose, K, *size, background)


def test_one_gaussian_matches_the_hand_computed_pixel_values():
    rgb, alpha, depth, _ = draw(single())
    # Centre projects to (8.5, 8.5), the centre of pixel (8, 8). Variance: (20 * 0.05 / 2)^2 + 0.3 = 0.55 px^2.
    assert alpha[8, 8].item() == pytest.approx(0.6, rel=1e-5)
    assert alpha[8, 9].item() == pytest.approx(0.6 * math.exp(-0.5 / 0.55), rel=1e-5)
    assert alpha[9, 9].item() == pytest.approx(0.6 * math.exp(-1.0 / 0.55), rel=1e-5)
    assert rgb[8, 9].tolist() == pytest.approx([c * alpha[8, 9].item() for c in (0.2, 0.5, 0.9)], rel=1e-5)
    assert depth[8, 8].item() == pytest.approx(2.0, rel=1e-6)
    # Three pixels away: 0.6 exp(-4.5 / 0.55) = 1.7e-4 lies below 1/255 and is not drawn.
    assert alpha[8, 11] == 0 and depth[8, 11] == 0


def test_an_off_axis_gaussian_is_sheared_by_the_perspective_jacobian():
    seen = project(*single((0.5, 0.0, 2.0), 0.1).tensors()[:3], torch.eye(4), K, 17, 17)
    # J = [[10, 0, -2.5], [0, 10, 0]]; Sigma = 0.01 I.
    expected = torch.tensor([[0.01 * (100 + 6.25) + EPS2D, 0.0], [0.0, 1.0 + EPS2D]])
    torch.testing.assert_close(seen.covariances2d[0], expected)
    torch.testing.assert_close(seen.means2d[0], torch.tensor([13.5, 8.5]))


def test_composition_is_premultiplied():
    # Colour 0.8 at alpha 0.5 over background 0.8 is 0.8; multiplying by alpha twice would give 0.64.
    rgb, alpha, _, _ = draw(single(opacity=0.5, color=(0.8, 0.8, 0.8)), background=torch.full((3,), 0.8))
    assert alpha[8, 8].item() == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(rgb, torch.full_like(rgb, 0.8))


def test_nearer_gaussians_cover_farther_ones_whatever_their_order():
    near, far = single((0, 0, 1.0), 0.025, 0.6, (1, 0, 0)), single((0, 0, 2.0), 0.05, 0.6, (0, 1, 0))
    for order in ([near, far], [far, near]):
        rgb, alpha, depth, _ = draw(Gaussians.concatenate(order))
        assert rgb[8, 8].tolist() == pytest.approx([0.6, 0.24, 0.0], abs=1e-5)
        assert alpha[8, 8].item() == pytest.approx(0.84, rel=1e-5)
        assert depth[8, 8].item() == pytest.approx((0.6 * 1 + 0.24 * 2) / 0.84, rel=1e-5)


def test_alpha_is_capped_and_light_stops_before_it_runs_out():
    opaque = [single((0, 0, 1.0 + 0.1 * i), 0.05, 0.99999, (0.5, 0.5, 0.5)) for i in range(3)]
    _, alpha, _, _ = draw(Gaussians.concatenate(opaque))
    # After the first: 1e-3 is left. The second would leave 1e-6 < 1e-4, so it and all behind it are dropped.
    assert alpha[8, 8].item() == pytest.approx(ALPHA_MAX, rel=1e-6)


@pytest.mark.parametrize("z", [-1.0, 0.0, 0.009])
def test_nothing_is_drawn_in_front_of_the_near_plane(z):
    gaussians = single((0.0, 0.0, z))
    _, alpha, _, _ = draw(gaussians)
    assert alpha.sum() == 0


def test_an_off_centre_principal_point_moves_the_picture():
    shifted = K.clone()
    shifted[0, 2] += 3
    shifted[1, 2] -= 2
    scene = random_gaussians(40)
    straight, moved = draw(scene)[0], draw(scene, K=shifted)[0]
    # Far from the border, where the frustum clamp cannot tell the two apart.
    torch.testing.assert_close(moved[2:12, 6:15], straight[4:14, 3:12], atol=1e-5, rtol=1e-4)


def test_moving_the_gaussians_equals_moving_the_camera_the_other_way():
    scene = random_gaussians(60)
    rotation = rotvec_to_matrix(torch.tensor([0.3, -0.5, 0.8]))
    translation = torch.tensor([0.4, -0.2, 0.7])
    pose = make_rigid(quat_to_matrix(torch.tensor([1.0, 0.1, -0.05, 0.02])), torch.tensor([0.05, 0.0, 0.2]))
    original = draw(scene, pose)
    moved = draw(scene.transformed(rotation, translation), pose @ torch.linalg.inv(make_rigid(rotation, translation)))
    for a, b in zip(original[:3], moved[:3], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_scaled_scene_looks_the_same_from_a_scaled_distance():
    scene = random_gaussians(60)
    original = draw(scene)
    grown = draw(scene.transformed(torch.eye(3), torch.zeros(3), 2.5))
    torch.testing.assert_close(original[0], grown[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(2.5 * original[2], grown[2], atol=1e-3, rtol=1e-3)


def test_gradients_match_finite_differences():
    scene = random_gaussians(3, degree=1)
    tensors = [t.double().requires_grad_() for t in scene.tensors()]
    weights = torch.rand(6, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    small = torch.tensor([[7.0, 0.0, 3.0], [0.0, 7.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        pose, background = torch.eye(4, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)
        rgb, alpha, _, _ = rasterize_reference(*values, pose, small, 6, 6, background)
        return (rgb * weights).sum() + (alpha * weights[..., 0]).sum()

    assert torch.autograd.gradcheck(loss, tensors, eps=1e-7, atol=1e-4, rtol=1e-3)


def test_gaussians_behind_the_camera_give_finite_gradients():
    scene = random_gaussians(10)
    means = scene.means.clone()
    means[::2, 2] = torch.tensor([-1.0, 0.0, 1e-9, -1e-4, 0.005])
    tensors = [t.clone().requires_grad_() for t in (means, *scene.tensors()[1:])]
    rgb, _, depth, _ = rasterize_reference(*tensors, torch.eye(4), K, 17, 17, BLACK)
    (rgb.sum() + depth.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in tensors)


def test_an_empty_scene_shows_the_background():
    background = torch.tensor([0.1, 0.2, 0.3])
    rgb, alpha, depth, _ = draw(Gaussians.empty(), background=background)
    torch.testing.assert_close(rgb, background.expand(17, 17, 3))
    assert alpha.sum() == 0 and depth.sum() == 0
