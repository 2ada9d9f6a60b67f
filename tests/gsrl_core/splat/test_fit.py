import math

import pytest
import torch

from gsrl_core.capture.dataset import View
from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.splat import fit as fit_module
from gsrl_core.splat.fit import FitSettings, fit, initial_gaussians, scene_extent
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.quality import psnr
from gsrl_core.splat.raster_numba import rasterize

SETTINGS = FitSettings(
    steps=150, max_gaussians=500, sh_degree=1, ssim_weight=0.2, densify_every=25, densify_until=0.6,
    checkpoint_every=50, seed=3,
)  # fmt: skip


class Recorder:
    def __init__(self):
        self.values, self.fractions = [], []

    def metrics(self, values, step):
        self.values.append((step, dict(values)))

    def progress(self, fraction, message):
        self.fractions.append(fraction)


def render(gaussians, camera):
    with torch.no_grad():
        return rasterize(
            *gaussians.tensors(), camera.world_to_camera[0], camera.K[0], camera.width, camera.height, torch.zeros(3)
        )[0].clamp(0, 1)


@pytest.fixture(scope="module")
def world():
    """(views, sparse points, their colours): eleven pictures of a coloured sphere on a plane of known Gaussians."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(600, 3, generator=generator), dim=1)
    ball = 0.3 * directions + torch.tensor([0, 0, 0.3])
    plane = torch.cat([torch.rand(900, 2, generator=generator) * 2 - 1, torch.zeros(900, 1)], dim=1)
    means = torch.cat([ball, plane])
    colors = 0.5 + 0.4 * torch.sin(7 * means + torch.tensor([0.0, 1.0, 2.0]))
    truth = Gaussians(
        means, torch.randn(1500, 4, generator=generator), torch.full((1500, 3), -3.1), torch.full((1500,), 3.0),
        colors_to_harmonics(colors),
    )  # fmt: skip
    views = []
    for i in range(11):
        angle = 2 * math.pi * i / 11
        eye = torch.tensor([1.6 * math.cos(angle), 1.6 * math.sin(angle), 1.2])
        size = (72, 56) if i % 3 else (56, 72)  # landscape and portrait
        camera = Camera(
            look_at(eye, torch.tensor([0.0, 0, 0.1]))[None], intrinsics(70, 70, size[0] / 2, size[1] / 2)[None], *size
        )
        views.append(View(f"{i}.png", (render(truth, camera) * 255 + 0.5).to(torch.uint8), camera))
    chosen = torch.randperm(1500, generator=generator)[:150]
    return views, means[chosen], (colors[chosen] * 255).to(torch.uint8)


def run(world, workspace, settings=SETTINGS, reporter=None):
    views, points, colors = world
    return fit(views[1:], points, colors, settings, rasterize, workspace, reporter or Recorder())


def test_fit_predicts_a_picture_it_has_not_seen(world, tmp_path):
    views, points, colors = world
    recorder = Recorder()
    result = run(world, tmp_path, reporter=recorder)
    held_out = views[0]
    before = psnr(render(initial_gaussians(points, colors, 0), held_out.camera), held_out.rgb.float() / 255)
    after = psnr(render(result.gaussians, held_out.camera), held_out.rgb.float() / 255)
    assert after > 18 and after > before + 5
    assert 450 < len(result.gaussians) <= 500
    assert recorder.fractions[-1] == 1.0
    assert [step for step, _ in recorder.values] == [50, 100, 150]
    assert recorder.values[-1][1]["fit/loss"] < recorder.values[0][1]["fit/loss"]


class KilledError(Exception):
    pass


def test_a_killed_fit_continues_to_the_same_bits(world, tmp_path, monkeypatch):
    settings = FitSettings(**{**SETTINGS.__dict__, "steps": 60, "densify_every": 10, "checkpoint_every": 1})
    whole = run(world, tmp_path / "whole", settings).gaussians

    class Killer(Recorder):
        def progress(self, fraction, message):
            if 0 < fraction < 1:
                raise KilledError

    monkeypatch.setattr(fit_module, "METRICS_EVERY", 37)
    with pytest.raises(KilledError):
        run(world, tmp_path / "killed", settings, Killer())
    saved = torch.load(tmp_path / "killed" / "fit.pt", weights_only=True)["step"]
    assert saved == 36  # the step that was being reported is lost
    recorder = Recorder()
    resumed = run(world, tmp_path / "killed", settings, recorder).gaussians
    assert [step for step, _ in recorder.values] == [37, 60]
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), resumed.tensors(), strict=True))


def test_states_are_saved_every_so_many_steps(world, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "METRICS_EVERY", 1)
    saved = []

    class Watcher(Recorder):
        def progress(self, fraction, message):
            state = tmp_path / "fit.pt"
            saved.append(torch.load(state, weights_only=True)["step"] if state.is_file() else 0)

    run(world, tmp_path, FitSettings(**{**SETTINGS.__dict__, "steps": 5, "checkpoint_every": 2}), Watcher())
    assert saved == [0, 0, 2, 2, 4]
    assert torch.load(tmp_path / "fit.pt", weights_only=True)["step"] == 5


SHORT = FitSettings(**{**SETTINGS.__dict__, "steps": 3})


def other_settings(views, points, colors):
    return (views, points, colors), FitSettings(**{**SHORT.__dict__, "ssim_weight": 0.3})


def other_points(views, points, colors):
    return (views, points.flip(0), colors), SHORT


def other_focal_length(views, points, colors):
    camera = views[0].camera
    wider = Camera(
        camera.world_to_camera, camera.K * torch.tensor([0.99, 0.99, 1])[:, None], camera.width, camera.height
    )
    return ([View(views[0].name, views[0].rgb, wider), *views[1:]], points, colors), SHORT


def other_pixel_order(views, points, colors):
    return ([View(views[0].name, views[0].rgb.flip(0), views[0].camera), *views[1:]], points, colors), SHORT


@pytest.mark.parametrize("change", [other_settings, other_points, other_focal_length, other_pixel_order])
def test_a_checkpoint_of_another_fit_is_not_continued(world, tmp_path, change):
    run(world, tmp_path, SHORT)
    other, settings = change(*world)
    fresh = run(other, tmp_path / "fresh", settings).gaussians
    again = run(other, tmp_path, settings).gaussians
    assert all(torch.equal(a, b) for a, b in zip(fresh.tensors(), again.tensors(), strict=True))


def test_a_torn_checkpoint_is_begun_anew(world, tmp_path, caplog):
    whole = run(world, tmp_path, SHORT).gaussians
    state = tmp_path / "fit.pt"
    state.write_bytes(state.read_bytes()[:1000])
    again = run(world, tmp_path, SHORT).gaussians
    assert torch.equal(whole.means, again.means)
    assert "cannot be read" in caplog.text


def test_short_fits_move_the_means_faster():
    assert fit_module.means_rate_factor(30_000) == fit_module.means_rate_factor(100_000) == 1
    assert fit_module.means_rate_factor(7_500) == pytest.approx(2)


def test_seeds_change_the_result(world, tmp_path):
    settings = [FitSettings(**{**SETTINGS.__dict__, "steps": 12, "seed": seed}) for seed in (0, 1)]
    results = [run(world, tmp_path / str(s.seed), s).gaussians.means for s in settings]
    assert not torch.equal(*results)


def test_a_loss_that_is_not_finite_stops_the_fit(world, tmp_path):
    views, points, colors = world

    def broken(*arguments):
        rgb, alpha, depth, info = rasterize(*arguments)
        return rgb * float("nan"), alpha, depth, info

    with pytest.raises(SceneError, match="nan at step 1"):
        fit(views, points, colors, SETTINGS, broken, tmp_path, Recorder())


def test_bad_input_is_refused(world, tmp_path):
    views, points, colors = world
    with pytest.raises(SceneError, match="no photos"):
        fit([], points, colors, SETTINGS, rasterize, tmp_path, Recorder())
    with pytest.raises(SceneError, match="3 sparse points"):
        fit(views, points[:3], colors[:3], SETTINGS, rasterize, tmp_path, Recorder())


def test_initial_gaussians_by_hand():
    # Corners of a unit square: distances to the three others are 1, 1 and sqrt 2; root mean square sqrt(4 / 3).
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    start = initial_gaussians(points, torch.full((4, 3), 255, dtype=torch.uint8), 2)
    assert start.log_scales.exp() == pytest.approx(torch.full((4, 3), math.sqrt(4 / 3)).numpy())
    assert torch.sigmoid(start.logit_opacities) == pytest.approx(torch.full((4,), 0.1).numpy())
    assert start.sh_degree == 2 and torch.equal(start.harmonics[:, 1:], torch.zeros(4, 8, 3))


def test_duplicate_points_have_a_finite_size():
    points = torch.zeros(6, 3)
    points[4:] = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    start = initial_gaussians(points, torch.zeros(6, 3, dtype=torch.uint8), 0)
    assert start.log_scales.isfinite().all()


def test_scene_extent_by_hand():
    assert scene_extent(torch.tensor([[0.0, 0, 0], [2.0, 0, 0]])) == pytest.approx(1.1)
    assert scene_extent(torch.zeros(1, 3)) == 1.0
