import numpy as np
import pytest
import torch
import trimesh

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import intrinsics, look_at
from gsrl_core.geometry.props import cube_mesh
from gsrl_core.geometry.rotation import quat_to_matrix
from gsrl_core.splat import from_mesh
from gsrl_core.splat.from_mesh import ColoredMesh, Light, gaussians_from_mesh, load_mesh, sample_outside, shade
from gsrl_core.splat.harmonics import sh_colors
from gsrl_core.splat.raster_torch import rasterize_reference

RED, BLUE = (0.8, 0.1, 0.1), (0.1, 0.1, 0.8)


def ball(radius=0.1, color=RED):
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    return ColoredMesh.uniform(np.asarray(sphere.vertices), np.asarray(sphere.faces), color)


@pytest.fixture(scope="module")
def ball_gaussians():
    return gaussians_from_mesh(ball(), 200)


def test_gaussians_lie_flat_on_the_surface_of_a_ball(ball_gaussians):
    radius = ball_gaussians.means.norm(dim=1)
    assert len(ball_gaussians) == 200 and ball_gaussians.sh_degree == 0
    assert radius.min() > 0.095 and radius.max() < 0.1 + 1e-6
    thin = ball_gaussians.log_scales.argmin(dim=1)
    axis = quat_to_matrix(ball_gaussians.quats).gather(2, thin[:, None, None].expand(-1, 3, 1))[..., 0]
    cosine = (axis * ball_gaussians.means / radius[:, None]).sum(1).abs()
    assert cosine.min() > 0.97


def test_gaussians_are_spread_evenly(ball_gaussians):
    distance = torch.cdist(ball_gaussians.means, ball_gaussians.means).fill_diagonal_(1).min(dim=1).values
    # 200 hexagonal cells on a sphere of radius 0.1 are 27 mm apart; uniform random points would be 12.5 mm.
    assert distance.min() > 0.012 and 0.019 < distance.mean() < 0.027


def test_the_ball_is_drawn_as_an_opaque_disc_of_its_colour(ball_gaussians):
    view = look_at(torch.tensor([0.6, 0.3, 0.3]), torch.zeros(3))
    rgb, alpha, _, _ = rasterize_reference(
        *ball_gaussians.tensors(), view, intrinsics(150.0, 150.0, 32.0, 32.0), 64, 64, torch.zeros(3)
    )
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    # The ball's outline: sin(half angle) = 0.1 / distance.
    outline = 150 * np.tan(np.arcsin(0.1 / np.sqrt(0.36 + 0.09 + 0.09)))
    distance = ((rows - 32) ** 2 + (columns - 32) ** 2).sqrt()
    assert alpha[distance < 0.9 * outline].min() > 0.95
    assert alpha[distance > outline + 4].max() < 0.05
    torch.testing.assert_close(rgb[32, 32], torch.tensor(RED) * alpha[32, 32], atol=5e-3, rtol=0)


def test_hidden_inner_surfaces_are_not_sampled():
    shell, core = ball(0.1), ball(0.05, BLUE)
    samples = sample_outside(ColoredMesh.concatenate([shell, core]), 8000, 0)
    assert (np.linalg.norm(samples.points, axis=1) > 0.09).mean() > 0.995


def test_two_sided_thin_plates_keep_their_colours():
    top = trimesh.creation.box((0.1, 0.1, 0.002))
    colors = np.where((top.triangles_center[:, 2] > 0)[:, None], RED, BLUE)
    gaussians = gaussians_from_mesh(ColoredMesh(np.asarray(top.vertices), np.asarray(top.faces), colors), 100)
    color = sh_colors(gaussians.harmonics, gaussians.means)
    above = gaussians.means[:, 2] > 0.0005
    assert (color[above, 0] > 0.7).float().mean() > 0.95


def test_the_same_seed_gives_the_same_gaussians():
    cube = ColoredMesh.uniform(*cube_mesh(), RED)
    first, again, other = (gaussians_from_mesh(cube, 60, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))
    assert not torch.equal(first.means, other.means)


def test_shading_follows_lamberts_law_in_linear_light():
    light = Light(sun_direction=(0, 0, 2), sun=0.5, sky=0.0)
    normals = np.array([[0, 0, 1.0], [0, np.sqrt(0.75), 0.5], [0, 0, -1]])
    lit = shade(np.full((3, 3), 0.5), normals, np.ones(3), light)
    np.testing.assert_allclose(lit[:, 0] ** 2.2, 0.5**2.2 * np.array([0.5, 0.25, 0.0]), atol=1e-12)


def test_light_falls_in_the_world_frame():
    cube = ColoredMesh.uniform(*cube_mesh(), (0.5, 0.5, 0.5))
    upside_down = np.diag([1.0, -1.0, -1.0, 1.0])

    def brightness_of_the_top(pose):
        gaussians = gaussians_from_mesh(cube, 120, light=Light((0, 0, 1)), world_from_mesh=pose)
        return sh_colors(gaussians.harmonics, gaussians.means)[gaussians.means[:, 2] > 0.018].mean()

    assert brightness_of_the_top(np.eye(4)) > brightness_of_the_top(upside_down) + 0.1


def test_mesh_files_bring_their_colours(tmp_path):
    box = trimesh.creation.box((1, 1, 1))
    box.visual.face_colors = np.tile([255, 0, 0, 255], (12, 1))
    box.export(tmp_path / "box.ply")
    mesh = load_mesh(tmp_path / "box.ply")
    assert mesh.colors.shape == (12, 3) and np.allclose(mesh.colors, [1.0, 0.0, 0.0])
    (tmp_path / "bad.obj").write_text("nothing")
    with pytest.raises(SceneError, match=r"bad\.obj"):
        load_mesh(tmp_path / "bad.obj")
    with pytest.raises(SceneError, match=r"gone\.obj"):
        load_mesh(tmp_path / "gone.obj")


def test_impossible_requests_are_refused():
    with pytest.raises(SceneError, match="at least 1"):
        gaussians_from_mesh(ball(), 0)
    flat = ColoredMesh.uniform(np.zeros((3, 3)), np.array([[0, 1, 2]]), RED)
    with pytest.raises(SceneError, match="no area"):
        gaussians_from_mesh(flat, 10)


def test_more_gaussians_than_features_still_have_extent():
    triangle = ColoredMesh.uniform(np.eye(3), np.array([[0, 1, 2]]), RED)
    gaussians = gaussians_from_mesh(triangle, 3)
    assert 1 <= len(gaussians) <= 3 and torch.isfinite(gaussians.log_scales).all()
    scales = gaussians.log_scales.exp().sort(dim=1).values
    torch.testing.assert_close(scales[:, 0], from_mesh.FLATNESS * scales[:, 2])
