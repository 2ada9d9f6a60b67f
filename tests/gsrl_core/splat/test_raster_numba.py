import os
import threading

import numpy as np
import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.splat import parallel, raster_numba
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.raster_numba import NumbaRasterizer, rasterize
from gsrl_core.splat.raster_torch import rasterize_reference
from gsrl_core.splat.scene import Scene

BLACK = torch.zeros(3)


def cloud(count, degree, seed=0, spread=(1.0, 0.8, 0.5), center=(0.0, 0.0, 3.0)):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        normal(count, 3) * torch.tensor(spread) + torch.tensor(center),
        normal(count, 4),
        normal(count, 3) * 0.6 - 3.0,
        normal(count) * 2,
        normal(count, (degree + 1) ** 2, 3) * 0.3,
    )


def draw(function, gaussians, world_to_camera, K, size, background=BLACK):
    return function(*gaussians.tensors(), world_to_camera, K, *size, background)


VIEWS = {
    "centred": (torch.eye(4), intrinsics(80, 80, 35, 25), (70, 50)),
    "off-centre": (torch.eye(4), intrinsics(80, 95, 12, 44), (70, 50)),
    "partly outside and behind": (
        look_at(torch.tensor([0.2, 0.1, 2.6]), torch.tensor([1.0, 0.4, 3.1])),
        intrinsics(40, 40, 16, 16),
        (33, 31),
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_values_and_gradients_match_the_torch_twin(view, degree):
    world_to_camera, K, size = VIEWS[view]
    parameters = [t.requires_grad_() for t in cloud(250, degree).tensors()]
    background = torch.tensor([0.2, 0.4, 0.6]).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(size[1], size[0], *rest, generator=generator) for rest in ((3,), (), ())]
    results = []
    for function in (rasterize_reference, rasterize):
        *pictures, info = function(*parameters, world_to_camera, K, *size, background)
        if function is rasterize_reference:
            info["means2d"].retain_grad()
        loss = sum((picture * weight).sum() for picture, weight in zip(pictures, weights, strict=True))
        for tensor in (*parameters, background):
            tensor.grad = None
        loss.backward()
        grads = [t.grad for t in (*parameters, background, info["means2d"])]
        results.append(([p.detach() for p in pictures], [g.clone() for g in grads]))
    (expected, expected_grads), (found, found_grads) = results
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=2e-4)
    for a, b in zip(expected_grads, found_grads, strict=True):
        assert a.abs().max() > 0 or degree == 0
        assert (a - b).norm() <= 1e-3 * a.norm()


def test_absolute_gradients_of_one_gaussian_exceed_the_signed_ones():
    one = Gaussians(
        torch.tensor([[0.0, 0, 2]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), -2.0), torch.zeros(1),
        torch.zeros(1, 1, 3),
    )  # fmt: skip
    one = Gaussians(*(t.requires_grad_() for t in one.tensors()))
    rgb, _, _, info = draw(rasterize, one, torch.eye(4), intrinsics(60, 60, 24, 24), (48, 48))
    rgb.sum().backward()
    # The sum of a centred blob does not change when it moves, but every pixel's share does.
    assert info["means2d"].grad.abs().max() < 1e-4
    assert info["means2d"].absgrad.min() > 1
    assert info["radii"][0] > 3


def test_peak_of_one_gaussian_by_hand():
    # Opacity 0.5 on a pixel centre, colour 0.8 over background 0.2: 0.5 x 0.8 + 0.5 x 0.2 = 0.5, at depth 2.
    one = Gaussians(
        torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), -3.0), torch.zeros(1),
        colors_to_harmonics(torch.tensor([[0.8, 0.8, 0.8]])),
    )  # fmt: skip
    rgb, alpha, depth, _ = draw(
        rasterize, one, torch.eye(4), intrinsics(50, 50, 10.5, 10.5), (21, 21), torch.full((3,), 0.2)
    )
    assert rgb[10, 10].tolist() == pytest.approx([0.5] * 3, abs=1e-6)
    assert alpha[10, 10].item() == pytest.approx(0.5, abs=1e-6)
    assert depth[10, 10].item() == pytest.approx(2.0, abs=1e-5)
    assert alpha[0, 0] == 0 and depth[0, 0] == 0 and rgb[0, 0].tolist() == pytest.approx([0.2] * 3)


def test_nothing_to_draw_gives_the_background():
    rgb, alpha, depth, info = draw(
        rasterize, Gaussians.empty(2), torch.eye(4), intrinsics(50, 50, 10, 10), (20, 17), torch.tensor([0.1, 0.2, 0.3])
    )
    assert rgb.shape == (17, 20, 3) and torch.equal(rgb, torch.tensor([0.1, 0.2, 0.3]).expand(17, 20, 3))
    assert alpha.abs().sum() == 0 and depth.abs().sum() == 0 and len(info["radii"]) == 0


def test_huge_and_degenerate_gaussians_match_the_twin():
    huge = cloud(40, 0, seed=3)
    log_scales = huge.log_scales.clone()
    log_scales[:10] += 5  # larger than the picture
    log_scales[10:20, 0] += 3
    log_scales[10:20, 1:] -= 6  # needles
    huge = Gaussians(huge.means, huge.quats, log_scales, huge.logit_opacities, huge.harmonics)
    view = (torch.eye(4), intrinsics(80, 80, 35, 25), (70, 50))
    expected, found = draw(rasterize_reference, huge, *view)[0], draw(rasterize, huge, *view)[0]
    assert (expected - found).abs().max() < 2e-3


def test_thousands_of_opaque_layers_stop_where_the_light_runs_out():
    count = 3000
    stack = Gaussians(
        torch.stack([torch.zeros(count), torch.zeros(count), torch.linspace(1, 5, count)], 1),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count, 3), 0.0),
        torch.full((count,), -2.0),
        torch.randn(count, 1, 3, generator=torch.Generator().manual_seed(0)),
    )
    view = (torch.eye(4), intrinsics(30, 30, 8, 8), (16, 16))
    expected, found = draw(rasterize_reference, stack, *view)[0], draw(rasterize, stack, *view)[0]
    assert torch.allclose(expected, found, atol=1e-4)


def test_same_bits_with_any_number_of_threads(monkeypatch):
    gaussians = Gaussians(*(t.requires_grad_() for t in cloud(6000, 1).tensors()))
    results = []
    for threads in (parallel.num_threads(), 1):
        monkeypatch.setattr(parallel, "num_threads", lambda threads=threads: threads)
        for tensor in gaussians.tensors():
            tensor.grad = None
        rgb, *_ = draw(rasterize, gaussians, torch.eye(4), intrinsics(200, 200, 100, 80), (200, 160))
        rgb.square().sum().backward()
        results.append([rgb.detach(), *(t.grad.clone() for t in gaussians.tensors())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_camera_gradients_are_refused():
    with pytest.raises(ValueError, match="camera gradients"):
        draw(rasterize, cloud(3, 0), torch.eye(4).requires_grad_(), intrinsics(50, 50, 10, 10), (20, 20))


# --- batches of posed scenes


def wall(depth, opacity_logit, color, count=40, extent=1.2):
    """A flat sheet at z = depth that covers the whole picture."""
    axis = torch.linspace(-extent, extent, count)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    means = torch.stack([x.flatten(), y.flatten(), torch.full((count * count,), depth)], 1)
    step = 2 * extent / (count - 1)
    scales = torch.tensor([0.7 * step, 0.7 * step, 1e-3]).log()
    n = len(means)
    return Gaussians(
        means, torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1), scales.repeat(n, 1), torch.full((n,), float(opacity_logit)),
        colors_to_harmonics(torch.tensor([color]).repeat(n, 1)),
    )  # fmt: skip


def ball(seed, degree=2):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(150, 3, generator=generator), dim=1)
    gaussians = cloud(150, degree, seed)
    return Gaussians(
        0.12 * directions, gaussians.quats, torch.full((150, 3), -3.8), torch.full((150,), 3.0), gaussians.harmonics
    )


def make_scene(static):
    bodies = {"cube": (ball(1), torch.eye(4)), "plate": (ball(2), torch.eye(4))}
    return Scene.from_parts(static, bodies)


def pose(x, y, z, turn=0.0):
    return make_rigid(rotvec_to_matrix(torch.tensor([0.3, turn, 0.1])), torch.tensor([x, y, z]))


CAMERA = Camera(torch.eye(4)[None], intrinsics(90, 95, 44, 30)[None], 80, 64)


def joint_picture(scene, poses, camera):
    rgb, alpha, depth, _ = rasterize_reference(
        *scene.posed(poses).tensors(), camera.world_to_camera[0], camera.K[0], camera.width, camera.height, BLACK
    )
    return (rgb.clamp(0, 1) * 255 + 0.5).to(torch.uint8), alpha, depth


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, float((a.float() - b.float()).square().mean())))


def test_composite_equals_drawing_everything_together():
    scene = make_scene(wall(2.0, 8.0, (0.3, 0.5, 0.2)))
    poses = torch.stack(
        [
            torch.stack([pose(-0.3, 0, 1.5), pose(0.3, 0.1, 1.4, 2.0)]),
            torch.stack([pose(0, 0, 1.3, 1.0), pose(0, 0, 1.7)]),
        ]
    )
    frames = NumbaRasterizer().render(scene, poses, {"c": CAMERA}, extras=True)["c"]
    for i in range(2):
        expected, alpha, depth = joint_picture(scene, poses[i], CAMERA)
        assert psnr(frames.rgb[i], expected) > 45
        # Where the light runs out is a matter of the last Gaussian drawn, so single pixels may differ.
        assert (frames.alpha[i] - alpha).abs().mean() < 1e-3
        assert (frames.depth[i] - depth).abs().median() < 1e-3
    assert (frames.body_id[0, 30, 26], frames.body_id[0, 36, 63]) == (0, 1)
    assert frames.body_id[0, 3, 3] == -1


def test_a_body_behind_the_wall_is_hidden():
    scene = make_scene(wall(1.0, 8.0, (0.3, 0.5, 0.2)))
    away = pose(0, 0, -5)
    hidden = torch.stack([torch.stack([pose(0, 0, 1.5), away]), torch.stack([away, away])])
    frames = NumbaRasterizer().render(scene, hidden, {"c": CAMERA}, extras=True)["c"]
    assert (frames.rgb[0].int() - frames.rgb[1].int()).abs().max() <= 2  # the wall covers 99 %
    assert (frames.body_id == -1).all()
    assert torch.allclose(frames.depth, torch.tensor(1.0), atol=0.01)


def test_a_glass_wall_lets_a_body_through_as_in_the_joint_picture():
    scene = make_scene(wall(1.0, -0.2, (0.3, 0.5, 0.2), count=30))
    poses = torch.stack([pose(0, 0, 1.5), pose(0.2, 0.1, 0.7)])[None]
    found = NumbaRasterizer().render(scene, poses, {"c": CAMERA})["c"].rgb[0]
    expected, alpha, _ = joint_picture(scene, poses[0], CAMERA)
    assert 0.5 < alpha.median() < 0.97  # really glass
    assert psnr(found, expected) > 45


def test_a_body_that_touches_the_wall_does_not_sink_in():
    scene = make_scene(wall(1.0, 8.0, (0.3, 0.5, 0.2)))
    flat = ball(1)
    thin = Gaussians(flat.means * torch.tensor([1.0, 1.0, 0.0]), *flat.tensors()[1:])
    scene = Scene.from_parts(scene.part(None), {"sticker": (thin, torch.eye(4))})
    touching = make_rigid(torch.eye(3), torch.tensor([0.0, 0.0, 1.004]))[None, None]
    ids = NumbaRasterizer().render(scene, touching, {"c": CAMERA}, extras=True)["c"].body_id[0]
    assert (ids == 0).sum() > 100


def test_environments_cameras_and_cache_do_not_change_a_picture(monkeypatch):
    scene = make_scene(wall(2.0, 2.0, (0.3, 0.5, 0.2)))
    generator = torch.Generator().manual_seed(0)
    poses = torch.stack(
        [
            torch.stack([pose(*(torch.rand(2, generator=generator) - 0.5).tolist(), 1.4, i), pose(0, 0.2, 1.6)])
            for i in range(5)
        ]
    )
    rasterizer = NumbaRasterizer()
    together = rasterizer.render(scene, poses, {"c": CAMERA}, extras=True)["c"]
    own = Camera(CAMERA.world_to_camera.repeat(5, 1, 1), CAMERA.K.repeat(5, 1, 1), 80, 64)
    by_camera = NumbaRasterizer().render(scene, poses, {"c": own})["c"]
    assert torch.equal(by_camera.rgb, together.rgb)
    for i in range(5):
        alone = NumbaRasterizer().render(scene, poses[i : i + 1], {"c": CAMERA}, extras=True)["c"]
        for field in ("rgb", "depth", "alpha", "body_id"):
            assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i])
    monkeypatch.setattr(parallel, "num_threads", lambda: 1)
    assert torch.equal(rasterizer.render(scene, poses, {"c": CAMERA})["c"].rgb, together.rgb)


def test_each_environment_has_its_own_camera():
    scene = make_scene(wall(2.0, 2.0, (0.3, 0.5, 0.2)))
    poses = torch.stack([pose(-0.2, 0, 1.4), pose(0.2, 0.2, 1.6)])[None].repeat(3, 1, 1, 1)
    views = torch.stack([look_at(torch.tensor([0.1 * i, 0.05, 0.0]), torch.tensor([0.0, 0.0, 2.0])) for i in range(3)])
    cameras = Camera(views, intrinsics(60, 60, 24, 20).repeat(3, 1, 1), 48, 40)
    frames = NumbaRasterizer().render(scene, poses, {"c": cameras})["c"]
    for i in range(3):
        assert psnr(frames.rgb[i], joint_picture(scene, poses[i], cameras.select(i))[0]) > 40
    assert psnr(frames.rgb[0], frames.rgb[2]) < 30


def test_static_pictures_are_kept_within_the_byte_limit(monkeypatch):
    scene = make_scene(wall(2.0, 2.0, (0.3, 0.5, 0.2)))
    drawn = []
    original = raster_numba.draw
    monkeypatch.setattr(raster_numba, "draw", lambda *a: drawn.append(1) or original(*a))
    poses = scene.rest_to_world[None]
    rasterizer = NumbaRasterizer()
    for _ in range(3):
        rasterizer.render(scene, poses, {"c": CAMERA})
    assert len(drawn) == 1
    small = NumbaRasterizer(cache_bytes=1)
    others = [Camera(CAMERA.world_to_camera, CAMERA.K + i, 80, 64) for i in (1, 2)]
    for camera in (*others, *others):
        small.render(scene, poses, {"c": camera})
    assert len(drawn) == 1 + 4


def test_a_new_scene_replaces_the_old_one():
    rasterizer = NumbaRasterizer()
    poses = torch.stack([pose(0, 0, -5), pose(0, 0, -5)])[None]
    green = rasterizer.render(make_scene(wall(1.0, 8.0, (0.0, 1.0, 0.0))), poses, {"c": CAMERA})["c"].rgb
    red = rasterizer.render(make_scene(wall(1.0, 8.0, (1.0, 0.0, 0.0))), poses, {"c": CAMERA})["c"].rgb
    assert green[0, 30, 40].tolist()[1] > 250 and red[0, 30, 40].tolist()[0] > 250
    assert red[0, 30, 40].tolist()[1] < 5


def test_background_shows_where_nothing_is():
    scene = make_scene(Gaussians.empty())
    poses = torch.stack([pose(0, 0, 1.2), pose(0, 0, -5)])[None]
    frames = NumbaRasterizer(background=(1.0, 0.5, 0.0)).render(scene, poses, {"c": CAMERA}, extras=True)["c"]
    assert frames.rgb[0, 0, 0].tolist() == [255, 128, 0]
    assert frames.depth[0, 0, 0] == 0 and frames.alpha[0, 0, 0] == 0 and frames.body_id[0, 0, 0] == -1


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4)])
def test_poses_that_do_not_fit_are_refused(shape):
    with pytest.raises(SceneError, match="body_to_world"):
        NumbaRasterizer().render(make_scene(Gaussians.empty()), torch.zeros(shape), {"c": CAMERA})


# --- threads


def test_chunks_cover_the_range_once_and_nested_calls_end():
    hits = np.zeros(103, np.int64)

    def inner(start, stop):
        hits[start:stop] += 1

    parallel.run_chunks(lambda a, b: parallel.run_chunks(lambda c, d: inner(a + c, a + d), b - a, 3), 103, 10)
    assert (hits == 1).all()


def test_an_exception_in_a_thread_is_raised():
    def fail(start, stop):
        if start == 8:
            raise RuntimeError("from a kernel")

    with pytest.raises(RuntimeError, match="from a kernel"):
        parallel.run_chunks(fail, 40, 2)
    parallel.run_chunks(lambda a, b: None, 40, 2)  # the pool is still usable


def test_two_threads_may_draw_at_once():
    gaussians = cloud(3000, 0)
    view = (torch.eye(4), intrinsics(80, 80, 35, 25), (70, 50))
    expected = draw(rasterize, gaussians, *view)[0]
    found = []
    threads = [threading.Thread(target=lambda: found.append(draw(rasterize, gaussians, *view)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and all(torch.equal(expected, f) for f in found)


def test_a_forked_child_can_draw():
    gaussians = cloud(3000, 0)
    view = (torch.eye(4), intrinsics(80, 80, 35, 25), (70, 50))
    draw(rasterize, gaussians, *view)
    arrays = [t.numpy() for t in gaussians.tensors()]
    pid = os.fork()
    if pid == 0:  # torch's own threads do not survive a fork, so the child stays below torch's threshold for them
        torch.set_num_threads(1)
        picture = draw(rasterize, Gaussians(*(torch.from_numpy(a) for a in arrays)), *view)[0]
        os._exit(0 if picture.sum() > 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0
