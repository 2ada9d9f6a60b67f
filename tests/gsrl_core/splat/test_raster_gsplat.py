import sys
import types
from functools import partial

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.splat import raster_gsplat
from gsrl_core.splat.constants import EPS2D, FAR_PLANE, NEAR_PLANE
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics, sh_colors
from gsrl_core.splat.raster_gsplat import Layer, check_batch, composite, posed
from gsrl_core.splat.raster_torch import rasterize_reference
from gsrl_core.splat.scene import Scene

SIZE = (96, 64)
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def reference_rasterization(
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, *, near_plane, far_plane, eps2d, packed,
    tile_size, render_mode,
):  # fmt: skip
    """gsplat.rasterization's documented contract (batch axis, one camera each, RGB+D), by the torch reference."""
    assert (near_plane, far_plane, eps2d, packed, render_mode) == (NEAR_PLANE, FAR_PLANE, EPS2D, False, "RGB+D")
    batch, count = means.shape[:2]
    assert quats.shape == (batch, count, 4) and scales.shape == means.shape and opacities.shape == (batch, count)
    assert colors.shape[:2] == (batch, count) and viewmats.shape == (batch, 1, 4, 4) and Ks.shape == (batch, 1, 3, 3)
    pictures, alphas = [], []
    for b in range(batch):
        channels = torch.cat([colors[b], torch.zeros(count, -colors.shape[2] % 3)], dim=1)
        drawn = [
            rasterize_reference(
                means[b], quats[b], scales[b].log(), torch.logit(opacities[b]), colors_to_harmonics(part),
                viewmats[b, 0], Ks[b, 0], width, height, torch.zeros(3),
            )
            for part in channels.split(3, dim=1)
        ]  # fmt: skip
        alpha, depth = drawn[0][1:3]
        features = torch.cat([rgb for rgb, *_ in drawn], dim=-1)[..., : colors.shape[2]]
        pictures.append(torch.cat([features, (depth * alpha)[..., None]], dim=-1))
        alphas.append(alpha[..., None])
    return torch.stack(pictures)[:, None], torch.stack(alphas)[:, None], {}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def make(request, monkeypatch):
    """Makes rasterisers: on a GPU as they are; elsewhere around the reference in the place of gsplat's kernel."""
    if request.param == "cpu":
        import gsplat

        monkeypatch.setattr(gsplat, "rasterization", reference_rasterization)
        monkeypatch.setattr(raster_gsplat, "_check_backend", lambda: None)
    return partial(raster_gsplat.GsplatRasterizer, request.param)


def cloud(count, center, spread, degree=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        normal(count, 3) * spread + torch.tensor(center),
        normal(count, 4),
        normal(count, 3) * 0.3 - 3.6,
        normal(count) + 1.0,
        normal(count, (degree + 1) ** 2, 3) * 0.25,
    )


@pytest.fixture
def scene():
    table = cloud(400, (0.0, 0.0, 0.0), torch.tensor([0.4, 0.4, 0.005]))
    bodies = {
        "cube": (cloud(60, (0, 0, 0), 0.05, seed=1), torch.eye(4)),
        "plate": (cloud(80, (0, 0, 0), 0.05, seed=2), torch.eye(4)),
    }
    return Scene.from_parts(table, bodies)


@pytest.fixture
def poses():
    """Three environments, bodies well above the table."""
    rotations = rotvec_to_matrix(torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(5)))
    places = torch.tensor([[[0.0, 0, 0.3], [0.2, 0, 0.3]], [[-0.2, 0.1, 0.3], [0.1, 0.2, 0.3]], [[0, 0, 0.3]] * 2])
    return make_rigid(rotations, places)


def camera_from(*eyes):
    views = look_at(torch.tensor(eyes), torch.zeros(len(eyes), 3))
    return Camera(views, intrinsics(80.0, 82.0, 45.0, 35.0).expand(len(eyes), 3, 3), *SIZE)


def layer(rgb, alpha, depth):
    return Layer(torch.tensor([[[rgb]]]) * alpha, torch.tensor([[[alpha]]]), torch.tensor([[[alpha * depth]]]))


def test_posed_gaussians_equal_transformed_ones(scene, poses):
    camera = camera_from((0.5, 0.4, 0.9))
    moving = scene.body >= 0
    view = camera.world_to_camera.expand(3, 4, 4)
    means, _, colors = posed(scene.gaussians.select(moving), scene.body[moving].long(), poses, view)
    for environment in range(3):
        world = scene.posed(poses[environment]).select(slice(400, None))
        torch.testing.assert_close(means[environment], world.means, atol=1e-5, rtol=1e-4)
        expected = sh_colors(world.harmonics, world.means - camera.centers[0])
        torch.testing.assert_close(colors[environment], expected, atol=1e-4, rtol=1e-3)


def test_depth_decides_between_body_and_table():
    table = layer([0.2, 0.4, 0.6], 1.0, 1.0)
    before = composite(table, layer([1.0, 0.0, 0.0], 1.0, 0.9), torch.ones(1, 1, 1, 1))
    behind = composite(table, layer([1.0, 0.0, 0.0], 1.0, 1.1), torch.ones(1, 1, 1, 1))
    assert before.rgb.flatten().tolist() == [255, 0, 0] and before.body_id.item() == 0
    assert behind.rgb.flatten().tolist() == [51, 102, 153] and behind.body_id.item() == -1
    assert before.depth.item() == pytest.approx(0.9) and behind.depth.item() == pytest.approx(1.0)


def test_alpha_is_applied_once():
    # Colour 0.8 at alpha 0.5 over 0.8 stays 0.8 (204); applied twice it would be 0.64 (163).
    frames = composite(layer([0.8] * 3, 1.0, 1.0), layer([0.8] * 3, 0.5, 0.5), None)
    assert frames.rgb.flatten().tolist() == [204] * 3


def test_wrong_batches_are_refused(scene, poses):
    with pytest.raises(SceneError, match=r"\[B, 2, 4, 4\]"):
        check_batch(scene, poses[:, :1], {})
    with pytest.raises(SceneError, match="2 poses; give 1 for all environments or 3"):
        check_batch(scene, poses, {"side": camera_from((1.0, 0, 1), (0, 1.0, 1))})


def test_pictures_match_the_reference(scene, poses, make):
    cameras = {"shared": camera_from((0.5, 0.4, 0.9)), "own": camera_from((0.5, 0, 1), (0, 0.5, 1), (0.4, -0.4, 1))}
    frames = make(environments_per_pass=2).render(scene, poses, cameras, extras=True)
    for name, camera in cameras.items():
        for environment in range(3):
            index = environment if len(camera) > 1 else 0
            rgb, alpha, depth, _ = rasterize_reference(
                *scene.posed(poses[environment]).tensors(), camera.world_to_camera[index], camera.K[index], *SIZE,
                torch.zeros(3),
            )  # fmt: skip
            drawn = frames[name].rgb[environment].cpu().float() / 255
            psnr = -10 * torch.log10((drawn - rgb.clamp(0, 1)).square().mean())
            assert psnr > 40, (name, environment, psnr)
            torch.testing.assert_close(frames[name].alpha[environment].cpu(), alpha, atol=2e-3, rtol=0)
            seen = alpha > 0.9
            assert (frames[name].depth[environment].cpu() - depth)[seen].abs().mean() < 2e-3


def test_environments_do_not_see_each_other(scene, poses, make):
    cameras = {"view": camera_from((1.0, 0.4, 0.3))}
    rasterizer = make()
    together = rasterizer.render(scene, poses, cameras)["view"].rgb
    for environment in range(3):
        alone = make().render(scene, poses[environment : environment + 1], cameras)["view"].rgb
        assert torch.equal(alone[0], together[environment])


def test_the_static_cache_follows_scene_and_camera(scene, poses, make):
    rasterizer, first, second = make(), camera_from((0.5, 0.4, 0.9)), camera_from((0.2, 0.4, 0.9))
    a = rasterizer.render(scene, poses, {"view": first})["view"].rgb
    b = rasterizer.render(scene, poses, {"view": second})["view"].rgb
    assert not torch.equal(a, b)
    assert torch.equal(rasterizer.render(scene, poses, {"view": first})["view"].rgb, a)
    other = Scene.from_parts(Gaussians.empty(3), {n: (scene.part(n), torch.eye(4)) for n in scene.names})
    assert not torch.equal(rasterizer.render(other, poses, {"view": first})["view"].rgb, a)


def test_pixels_know_their_body(scene, poses, make):
    frames = make().render(scene, poses, {"view": camera_from((0.3, 0.2, 1.0))}, extras=True)["view"]
    assert set(frames.body_id.unique().tolist()) == {-1, 0, 1}
    assert (frames.depth[frames.alpha == 0] == 0).all()


def test_missing_kernels_are_explained(monkeypatch):
    backend = types.ModuleType("gsplat.cuda._backend")
    backend._C = None
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", backend)
    with pytest.raises(SceneError, match="rasterizer=numba"):
        raster_gsplat.GsplatRasterizer("cpu")


def test_cpu_and_cuda_draw_the_same_picture(scene, poses, make):
    raster_numba = pytest.importorskip("gsrl_core.splat.raster_numba")
    poses = poses.clone()
    poses[:, 0, 2, 3] = -0.3  # the first body lies behind the table
    cameras = {"shared": camera_from((0.5, 0.4, 0.9)), "own": camera_from((0.5, 0, 1), (0, 0.5, 1), (0.4, -0.4, 1))}
    on_cpu = raster_numba.NumbaRasterizer().render(scene, poses, cameras)
    for name, frames in make().render(scene, poses, cameras).items():
        error = (frames.rgb.cpu().float() - on_cpu[name].rgb.float()) / 255
        assert -10 * torch.log10(error.square().mean()) > 40
