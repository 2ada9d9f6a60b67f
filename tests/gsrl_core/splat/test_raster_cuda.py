from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.splat.constants import ALPHA_MIN, EPS2D, FAR_PLANE, NEAR_PLANE
from gsrl_core.splat.cuda import library, packing
from gsrl_core.splat.cuda.recording import Recording
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.raster_cuda import CudaRasterizer
from gsrl_core.splat.raster_gsplat import posed
from gsrl_core.splat.raster_numba import NumbaRasterizer
from gsrl_core.splat.scene import Scene


def on_gpu(test):
    """Marks a test that draws."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def cloud(count, center=(0.0, 0.0, 0.0), spread=0.05, degree=3, seed=0, size=-3.6):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        normal(count, 3) * torch.as_tensor(spread) + torch.tensor(center),
        normal(count, 4),
        normal(count, 3) * 0.5 + size,
        normal(count) * 1.5 + 0.5,
        normal(count, (degree + 1) ** 2, 3) * 0.25,
    )


def make_scene(degree=3, static=3000):
    table = cloud(static, spread=(0.4, 0.4, 0.005), degree=degree)
    bodies = {
        "cube": (cloud(500, degree=degree, seed=1), torch.eye(4)),
        "plate": (cloud(700, degree=degree, seed=2), torch.eye(4)),
        "arm": (cloud(1500, spread=(0.02, 0.02, 0.3), degree=degree, seed=3), torch.eye(4)),
    }
    return Scene.from_parts(table, bodies)


def make_poses(count, height=0.15, seed=5):
    generator = torch.Generator().manual_seed(seed)
    rotations = rotvec_to_matrix(torch.randn(count, 3, 3, generator=generator))
    places = (torch.rand(count, 3, 3, generator=generator) - 0.5) * 0.5
    return make_rigid(rotations, places + torch.tensor([0.0, 0.0, height]))


def cameras(count, width=203, height=150):
    """One fixed camera, and one that every environment has its own pose of."""
    eyes = torch.tensor([0.6, 0.5, 0.7]) + 0.2 * torch.randn(count, 3, generator=torch.Generator().manual_seed(9))
    K = intrinsics(170.0, 174.0, 95.0, 80.0)[None]
    own = Camera(look_at(eyes, torch.zeros(count, 3)), K.repeat(count, 1, 1), width, height)
    fixed = Camera(look_at(torch.tensor([[0.5, 0.4, 0.8]]), torch.zeros(1, 3)), K, width, height)
    return {"fixed": fixed, "own": own}


def moved_a_little(camera):
    view = camera.world_to_camera.clone()
    view[:, :3, 3] += 0.02
    return Camera(view, camera.K.clone(), camera.width, camera.height)


def same_frames(a, b):
    """Bits of pictures and bodies; the kernels of kept and of live static parts may round a depth differently."""
    near = all(torch.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5) for name in ("depth", "alpha"))
    return near and torch.equal(a.rgb, b.rgb) and torch.equal(a.body_id, b.body_id)


def psnr(a, b):
    error = (a.cpu().float() - b.cpu().float()).square().mean()
    return float(10 * torch.log10(255**2 / error.clamp_min(1e-9)))


# --- what needs no GPU


def test_chunks_cover_every_visible_gaussian_once_and_hold_one_body_each():
    scene = make_scene(degree=1, static=2500)
    packed = packing.pack(scene, torch.device("cpu"))
    kept = torch.sigmoid(scene.gaussians.logit_opacities) >= ALPHA_MIN
    chunks = packed.chunks.tolist()
    assert sum(count for _, count, _, _ in chunks) == int(kept.sum()) == len(packed.mean_reach)
    assert [first for first, *_ in chunks] == torch.tensor([0] + [c for _, c, _, _ in chunks]).cumsum(0)[:-1].tolist()
    assert all(0 < count <= library.CHUNK for _, count, _, _ in chunks)
    assert [body for *_, body, _ in chunks] == [3, 3, 3, 0, 1, 2, 2]
    assert [later for *_, later in chunks] == [0, 0, 0, 1, 1, 1, 1] and packed.static_chunks == 3
    expected = scene.part("cube").means[torch.sigmoid(scene.part("cube").logit_opacities) >= ALPHA_MIN]
    first, count = chunks[3][:2]
    found = packed.mean_reach[first : first + count, :3]
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_neighbours_in_a_chunk_are_close():
    packed = packing.pack(Scene.from_parts(cloud(20000, spread=1.0), {}), torch.device("cpu"))
    runs = packed.mean_reach[: 128 * 128, :3].reshape(-1, 128, 3)
    assert runs.std(dim=1).mean() < 0.4 * packed.mean_reach[:, :3].std(dim=0).mean()


def test_empty_scenes_can_be_packed():
    packed = packing.pack(
        Scene.from_parts(Gaussians.empty(), {"cube": (Gaussians.empty(), torch.eye(4))}), torch.device("cpu")
    )
    assert packed.chunks.shape == (0, 4) and packed.body_chunks == 0


# --- pictures


@on_gpu
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_pictures_equal_gsplats(degree):
    gsplat = pytest.importorskip("gsplat")
    scene = Scene.from_parts(
        Gaussians.empty(degree), {n: (make_scene(degree).part(n), torch.eye(4)) for n in ("cube", "arm")}
    )
    poses, camera = make_poses(4)[:, :2], cameras(4)["own"]
    found = CudaRasterizer().render(scene, poses, {"own": camera})["own"].rgb
    gaussians, body = scene.gaussians.to("cuda"), scene.body.long().cuda()
    view, K = camera.world_to_camera.cuda(), camera.K.cuda()
    means, quats, colors = posed(gaussians, body, poses.cuda(), view)
    drawn, _, _ = gsplat.rasterization(
        means, quats, gaussians.log_scales.exp().expand_as(means),
        torch.sigmoid(gaussians.logit_opacities).expand(4, -1), colors, view[:, None], K[:, None], camera.width,
        camera.height, near_plane=NEAR_PLANE, far_plane=FAR_PLANE, eps2d=EPS2D, packed=False,
    )  # fmt: skip
    expected = (drawn[:, 0].clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    difference = (found.int() - expected.int()).abs()
    assert psnr(found, expected) >= 70
    # Two Gaussians at depths that differ in the last bit may change places.
    assert (difference > 2).float().mean() < 1e-5


@on_gpu
@pytest.mark.parametrize("height", [0.2, 0.02, -0.2])
def test_pictures_equal_the_cpu_rasterisers(height):
    scene, poses, views = make_scene(), make_poses(3, height), cameras(3)
    background = (0.2, 0.4, 0.1)
    expected = NumbaRasterizer(background).render(scene, poses, views, extras=True)
    rasterizer = CudaRasterizer(background=background)
    plain = rasterizer.render(scene, poses, views)
    for name, frames in rasterizer.render(scene, poses, views, extras=True).items():
        assert torch.equal(frames.rgb, plain[name].rgb), name
        assert psnr(frames.rgb, expected[name].rgb) > 55, name
        assert (frames.alpha.cpu() - expected[name].alpha).abs().mean() < 1e-3
        assert (frames.depth.cpu() - expected[name].depth).abs().mean() < 2e-3
        assert (frames.body_id.cpu() != expected[name].body_id).float().mean() < 2e-3


@on_gpu
def test_alpha_is_applied_once():
    # Colour 0.8 at any alpha over 0.8 stays 0.8 (204); applied twice it would be darker at every rim.
    def grey(gaussians):
        return Gaussians(*gaussians.tensors()[:4], colors_to_harmonics(torch.full((len(gaussians), 3), 0.8)))

    scene = Scene.from_parts(grey(cloud(3000, spread=0.5)), {"cube": (grey(cloud(300, seed=1)), torch.eye(4))})
    pictures = CudaRasterizer(background=(0.8, 0.8, 0.8)).render(scene, make_poses(2)[:, :1], cameras(2))
    for frames in pictures.values():
        assert frames.rgb.min() >= 203 and frames.rgb.max() <= 204


@on_gpu
def test_a_body_on_a_surface_does_not_sink_in_and_one_behind_is_hidden():
    axis = torch.linspace(-1.2, 1.2, 60)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    count = x.numel()
    wall = Gaussians(
        torch.stack([x.flatten(), y.flatten(), torch.ones(count)], 1), torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.tensor([0.03, 0.03, 1e-3]).log().repeat(count, 1), torch.full((count,), 6.0),
        colors_to_harmonics(torch.tensor([[0.3, 0.5, 0.2]]).repeat(count, 1)),
    )  # fmt: skip
    disc = cloud(400, spread=(0.1, 0.1, 0.0), degree=0, seed=4)
    scene = Scene.from_parts(wall, {"sticker": (disc, torch.eye(4))})
    poses = make_rigid(torch.eye(3), torch.tensor([[[0.0, 0, 1.004]], [[0.0, 0, 1.3]], [[0.0, 0, -9.0]]]))
    view = {"c": Camera(torch.eye(4)[None], intrinsics(90, 95, 44, 30)[None], 80, 64)}
    frames = CudaRasterizer().render(scene, poses, view, extras=True)["c"]
    assert (frames.body_id[0] == 0).sum() > 100 and (frames.body_id[1:] == -1).all()
    assert (frames.rgb[1].int() - frames.rgb[2].int()).abs().max() <= 2


@on_gpu
@pytest.mark.parametrize("layers", ["spread", "same depth"])
def test_lists_longer_than_shared_memory_are_drawn_in_order(layers):
    # Thousands of faint Gaussians in a few tiles, so that no pixel is finished before the last of them.
    count = 9000
    generator = torch.Generator().manual_seed(0)
    z = (
        torch.linspace(1, 2, count)
        if layers == "spread"
        else 1.5 + 0.001 * torch.randint(0, 2, (count,), generator=generator)
    )
    stack = Gaussians(
        torch.stack([torch.zeros(count), torch.zeros(count), z], 1)[torch.randperm(count, generator=generator)],
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1), torch.full((count, 3), -1.5), torch.full((count,), -5.2),
        torch.randn(count, 1, 3, generator=generator),
    )  # fmt: skip
    if layers == "same depth":  # whatever their order, equal colours give one picture
        stack = Gaussians(*stack.tensors()[:4], colors_to_harmonics(torch.full((count, 3), 0.7)))
    scene = Scene.from_parts(Gaussians.empty(), {"stack": (stack, torch.eye(4))})
    view = {"c": Camera(torch.eye(4)[None], intrinsics(30, 30, 16, 16)[None], 32, 32)}
    poses = torch.eye(4)[None, None]
    found = CudaRasterizer().render(scene, poses, view)["c"].rgb
    expected = NumbaRasterizer().render(scene, poses, view)["c"].rgb
    assert (found.cpu().int() - expected.int()).abs().max() <= 1


@on_gpu
def test_environments_passes_and_repeats_do_not_change_a_picture():
    scene, poses, views = make_scene(), make_poses(5), cameras(5)
    together = CudaRasterizer().render(scene, poses, views)
    for _ in range(3):
        again = CudaRasterizer(environments_per_pass=2).render(scene, poses, views)
        assert all(torch.equal(again[name].rgb, together[name].rgb) for name in views)
    for i in range(5):
        own = {"fixed": views["fixed"], "own": views["own"].select(torch.tensor([i, i]))}
        alone = CudaRasterizer().render(scene, poses[[i, i]], own)
        assert all(torch.equal(alone[name].rgb[1], together[name].rgb[i]) for name in views)


@on_gpu
def test_room_for_entries_grows_instead_of_overflowing():
    scene, poses, views = make_scene(), make_poses(3), cameras(3)
    expected = CudaRasterizer().render(scene, poses, views)
    rasterizer = CudaRasterizer(cache_bytes=0)
    rasterizer.render(scene, poses, views)
    for key in rasterizer._room:
        rasterizer._room[key] = 10
    found = rasterizer.render(scene, poses, views)
    assert all(torch.equal(found[name].rgb, expected[name].rgb) for name in views)
    assert rasterizer._room[(library.LIVE, 203, 150)] > 1000 < rasterizer._room[(library.OVER_LAYER, 203, 150)]


@on_gpu
def test_a_recording_draws_what_render_draws_and_grows_too():
    scene, views = make_scene(), cameras(3)
    far, near = make_poses(3, height=-4.0), make_poses(3, height=0.4, seed=6)
    rasterizer = CudaRasterizer()
    rasterizer._load(scene)
    for mode in (library.OVER_LAYER, library.LIVE):
        rasterizer._room[(mode, views["own"].width, views["own"].height)] = 10
    on_device = Camera(views["own"].world_to_camera.cuda(), views["own"].K.cuda(), 203, 150)
    recording = Recording(rasterizer, scene, far, views | {"own": on_device}, moving=["own"])
    for poses in (far, near, far):
        moved = views | {"own": Camera(views["own"].world_to_camera.flip(0), views["own"].K, 203, 150)}
        expected = CudaRasterizer().render(scene, poses, moved)
        found = recording(poses, {"own": moved["own"]})
        assert all(torch.equal(found[name].rgb, expected[name].rgb) for name in views)
    assert torch.equal(on_device.world_to_camera.cpu(), views["own"].world_to_camera)
    fresh = CudaRasterizer().render(scene, near, views)["own"].rgb
    assert torch.equal(rasterizer.render(scene, near, views)["own"].rgb, fresh)
    rasterizer.render(make_scene(degree=0), near, views)  # what the graph reads must outlive this
    torch.cuda.empty_cache()
    assert torch.equal(recording(far)["own"].rgb, expected["own"].rgb)


@on_gpu
@pytest.mark.parametrize("count", [1, 3])
def test_a_recording_follows_every_camera_that_may_move(count):
    scene, poses, views = make_scene(), make_poses(count), cameras(count)
    moving = Recording(CudaRasterizer(), scene, poses, views, moving=["fixed", "own"], extras=True)
    still = Recording(CudaRasterizer(), scene, poses, views, extras=True)
    assert all(plan.mode == library.OVER_LAYER for plan in still._plans.values())
    shifted = {name: moved_a_little(camera) for name, camera in views.items()}
    for seen in (shifted, views):
        expected = CudaRasterizer().render(scene, poses, seen, extras=True)
        found = moving(poses, seen)
        assert all(same_frames(found[name], expected[name]) for name in views)
    assert all(same_frames(frames, expected[name]) for name, frames in still(poses).items())
    with pytest.raises(SceneError, match="'fixed' was recorded as standing still"):
        still(poses, {"fixed": shifted["fixed"]})


@on_gpu
def test_recording_and_rendering_threads_take_turns():
    scene, poses, views = make_scene(), make_poses(3), cameras(3)
    rasterizer = CudaRasterizer()
    expected = CudaRasterizer().render(scene, poses, views)

    def render(_):
        return rasterizer.render(scene, poses, views)["own"].rgb

    def record(_):
        return Recording(rasterizer, scene, poses, views, moving=["own"])(poses)["own"].rgb.clone()

    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(lambda work: work(None), [render, record] * 10)]
    assert all(torch.equal(rgb, expected["own"].rgb) for rgb in found)


@on_gpu
def test_threads_that_draw_different_numbers_of_environments_get_the_serial_bits():
    scene, counts = make_scene(), (2, 7)
    batches = {count: (make_poses(count, seed=count), cameras(count)) for count in counts}
    expected = {count: CudaRasterizer().render(scene, *batches[count], extras=True) for count in counts}
    rasterizer = CudaRasterizer(environments_per_pass=3)

    def draw(count):
        poses, views = batches[count]
        frames = [rasterizer.render(scene, poses, views, extras=True) for _ in range(20)]
        return all(same_frames(one[name], expected[count][name]) for one in frames for name in views)

    with ThreadPoolExecutor(len(counts)) as threads:
        assert all(threads.map(draw, counts))


@on_gpu
def test_the_static_picture_follows_scene_and_camera():
    scene, poses, first = make_scene(), make_poses(2), cameras(2)["fixed"]
    K = first.K.clone()
    K[:, :2, 2] += 3
    second = Camera(first.world_to_camera.clone(), K, first.width, first.height)
    rasterizer = CudaRasterizer()
    a, b = (rasterizer.render(scene, poses, {"c": camera})["c"].rgb for camera in (first, second))
    assert not torch.equal(a, b)
    assert torch.equal(rasterizer.render(scene, poses, {"c": first})["c"].rgb, a)
    first.K[:, :2, 2] += 3  # changed in place
    assert torch.equal(rasterizer.render(scene, poses, {"c": first})["c"].rgb, b)
    other = Scene.from_parts(Gaussians.empty(3), {n: (scene.part(n), torch.eye(4)) for n in scene.names})
    assert not torch.equal(rasterizer.render(other, poses, {"c": second})["c"].rgb, b)


@on_gpu
def test_cameras_that_stand_still_keep_the_static_picture_of_each_environment():
    scene, poses, own = make_scene(), make_poses(3), cameras(3)["own"]
    rasterizer = CudaRasterizer(environments_per_pass=2)
    drawn, kept = [], []
    for camera in (own, own, own.select(slice(None)), moved_a_little(own)):
        drawn.append(rasterizer.render(scene, poses, {"own": camera})["own"].rgb)
        kept.append(rasterizer._known["own"].layer is not None)
    assert kept == [False, True, True, False]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])
    small = CudaRasterizer(cache_bytes=1000)
    for _ in range(2):
        assert torch.equal(small.render(scene, poses, {"own": own})["own"].rgb, drawn[0])
    assert small._known["own"].layer is None


@on_gpu
def test_static_pictures_are_found_for_each_environment_while_the_batch_shrinks():
    scene, poses, own = make_scene(), make_poses(5), cameras(5)["own"]
    rasterizer = CudaRasterizer(environments_per_pass=2)
    expected = CudaRasterizer().render(scene, poses, {"own": own}, extras=True)["own"]
    for left in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 3, 4], [4, 2, 0], [3], [0, 1, 2, 3, 4]):
        found = rasterizer.render(scene, poses[left], {"own": own.select(left)}, extras=True)["own"]
        chosen = Frames(*(getattr(expected, name)[left] for name in ("rgb", "depth", "alpha", "body_id")))
        assert same_frames(found, chosen), left
        plain = rasterizer.render(scene, poses[left], {"own": own.select(left)})["own"]
        assert torch.equal(plain.rgb, chosen.rgb), left
    assert len(rasterizer._known["own"].layer.color) == 5


@on_gpu
def test_pictures_of_many_tiles_equal_the_cpus():
    scene, poses = make_scene(degree=0), make_poses(1)
    camera = Camera(
        look_at(torch.tensor([[0.5, 0.4, 0.8]]), torch.zeros(1, 3)), intrinsics(1500, 1500, 990, 570)[None], 2100, 1100
    )
    found = CudaRasterizer().render(scene, poses, {"c": camera}, extras=True)["c"]
    expected = NumbaRasterizer().render(scene, poses, {"c": camera}, extras=True)["c"]
    assert psnr(found.rgb, expected.rgb) > 55
    assert (found.alpha.cpu() - expected.alpha).abs().mean() < 1e-3


@on_gpu
def test_pictures_that_are_too_large_are_refused():
    huge = Camera(torch.eye(4)[None], torch.eye(3)[None], 8000, 8000)
    with pytest.raises(SceneError, match="8000 x 8000"):
        CudaRasterizer().render(make_scene(), make_poses(1), {"huge": huge})


@on_gpu
def test_huge_and_degenerate_gaussians_match_the_cpu():
    huge = cloud(60, center=(0.0, 0.0, 3.0), spread=1.0, degree=0, seed=3, size=-3.0)
    huge.log_scales[:10] += 5  # larger than the picture
    huge.log_scales[10:20, 0] += 3
    huge.log_scales[10:20, 1:] -= 6  # needles
    scene = Scene.from_parts(Gaussians.empty(), {"huge": (huge, torch.eye(4))})
    view = {"c": Camera(torch.eye(4)[None], intrinsics(80, 80, 35, 25)[None], 70, 50)}
    poses = torch.eye(4)[None, None]
    found = CudaRasterizer().render(scene, poses, view)["c"].rgb
    expected = NumbaRasterizer().render(scene, poses, view)["c"].rgb
    assert psnr(found, expected) > 45


@on_gpu
def test_nothing_to_draw_and_no_environment():
    empty = Scene.from_parts(Gaussians.empty(), {})
    views = cameras(2)
    frames = CudaRasterizer(background=(1.0, 0.5, 0.0)).render(empty, torch.zeros(2, 0, 4, 4), views, extras=True)
    for name in views:
        assert frames[name].rgb[1, 3, 5].tolist() == [255, 128, 0] and (frames[name].alpha == 0).all()
    none = CudaRasterizer().render(make_scene(), torch.zeros(0, 3, 4, 4), {"fixed": views["fixed"]})
    assert none["fixed"].rgb.shape == (0, 150, 203, 3)


@on_gpu
def test_wrong_batches_are_refused():
    with pytest.raises(SceneError, match="2 poses; give 1 for all environments or 3"):
        CudaRasterizer().render(make_scene(), make_poses(3), {"own": cameras(2)["own"]})
