import math

import pytest
import torch

from gsrl_core.capture.dataset import View
from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.splat import fit as fit_module
from gsrl_core.splat.densify import Growth, Trainable, budget_at, split_along_longest_axis
from gsrl_core.splat.fit import FitSettings, fit, initial_gaussians, scene_extent
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.quality import psnr
from gsrl_core.splat.raster_numba import rasterize
from gsrl_core.splat.raster_torch import project

SETTINGS = FitSettings(
    steps=150, max_gaussians=500, sh_degree=1, ssim_weight=0.2, densify_every=25, densify_until=0.6, seed=3
)


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
    settings = FitSettings(**{**SETTINGS.__dict__, "steps": 60, "densify_every": 10})
    whole = run(world, tmp_path / "whole", settings).gaussians

    class Killer(Recorder):
        def progress(self, fraction, message):
            if 0 < fraction < 1:
                raise KilledError

    monkeypatch.setattr(fit_module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(fit_module, "METRICS_EVERY", 37)
    with pytest.raises(KilledError):
        run(world, tmp_path / "killed", settings, Killer())
    saved = torch.load(tmp_path / "killed" / "fit.pt", weights_only=True)["step"]
    assert saved == 36  # the step that was being reported is lost
    recorder = Recorder()
    resumed = run(world, tmp_path / "killed", settings, recorder).gaussians
    assert [step for step, _ in recorder.values] == [37, 60]
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), resumed.tensors(), strict=True))


def test_a_checkpoint_of_other_settings_is_not_used(world, tmp_path):
    short = FitSettings(**{**SETTINGS.__dict__, "steps": 3})
    run(world, tmp_path, short)
    recorder = Recorder()
    run(world, tmp_path, FitSettings(**{**short.__dict__, "steps": 4}), recorder)
    assert recorder.values[0][0] == 4
    assert torch.load(tmp_path / "fit.pt", weights_only=True)["fingerprint"]["settings"]["steps"] == 4


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


# --- growth


@pytest.mark.parametrize(("step", "expected"), [(0, 100), (50, 175), (100, 200), (150, 200)])
def test_budget_by_hand(step, expected):
    assert budget_at(step, 0, 100, 100, 200) == expected


def test_budget_never_falls_below_what_is_there():
    assert budget_at(50, 0, 100, 300, 200) == 300


def test_a_split_keeps_the_second_moment(random_gaussians):
    model = Trainable(random_gaussians(count=5, degree=1), 1.0)
    index = torch.tensor([1, 3])
    children = split_along_longest_axis(model, index)
    view = (torch.eye(4), intrinsics(1, 1, 0, 0), 1, 1)
    far = torch.tensor([0.0, 0.0, 1e3])  # far away the projection is orthographic

    def moment(values, rows):
        means = values["means"][rows]
        projected = project(means + far, values["quats"][rows], values["log_scales"][rows], *view)
        covariance = (projected.covariances2d - 0.3 * torch.eye(2)) * 1e6
        return means, covariance

    parents = {name: model[name].detach() for name in ("means", "quats", "log_scales")}
    parent_means, parent_covariance = moment(parents, index)
    a, cov_a = moment(children, torch.tensor([0, 1]))
    b, cov_b = moment(children, torch.tensor([2, 3]))
    assert torch.allclose((a + b) / 2, parent_means, atol=1e-5)
    offset = ((a - b) / 2)[:, :2]
    assert torch.allclose((cov_a + cov_b) / 2 + offset[:, :, None] * offset[:, None], parent_covariance, atol=0.05)


def model_with_moments(gaussians):
    model = Trainable(gaussians, 100.0)
    for name in ("means", "quats", "log_scales", "logit_opacities", "base", "detail"):
        model[name].grad = torch.ones_like(model[name])
    model.step()
    return model


def test_growth_prunes_the_transparent_and_splits_the_ones_with_a_gradient(random_gaussians):
    gaussians = random_gaussians(count=6, degree=1)
    logits = torch.tensor([2.0, -9.0, 2.0, 2.0, 2.0, 2.0])
    model = model_with_moments(Gaussians(*gaussians.tensors()[:3], logits, gaussians.harmonics))
    growth = Growth(6)
    gradient = torch.zeros(6, 2)
    gradient[[2, 4]] = 1.0
    growth.observe(gradient, torch.ones(6), 100)
    before = model["means"].detach().clone()
    facts = growth.apply(model, 100, torch.Generator().manual_seed(0))
    assert facts == {"pruned": 1, "split": 2} and len(model) == 7
    kept = [0, 3, 5]  # untouched rows keep value and optimizer state
    assert torch.equal(model["means"].detach()[[0, 2, 4]], before[kept])
    moments = model.optimizer.state[model["means"]]
    assert (moments["exp_avg"][[0, 2, 4]] != 0).all()
    assert (moments["exp_avg"][[1, 3, 5, 6]] == 0).all()
    assert len(growth.score) == 7 and growth.score.sum() == 0


def test_growth_respects_the_budget(random_gaussians):
    model = model_with_moments(random_gaussians(count=50, degree=0))
    growth = Growth(50)
    growth.observe(torch.rand(50, 2), torch.ones(50), 100)
    growth.apply(model, 53, torch.Generator().manual_seed(0))
    assert len(model) <= 53


def test_unseen_gaussians_have_no_score():
    growth = Growth(2)
    growth.observe(torch.ones(2, 2), torch.tensor([0.0, 3.0]), 100)
    assert growth.score.tolist() == [0.0, pytest.approx(50 * math.sqrt(2))]
    assert growth.seen.tolist() == [0, 1]


def test_nothing_left_is_an_error(random_gaussians):
    gaussians = random_gaussians(count=4, degree=0)
    model = Trainable(Gaussians(*gaussians.tensors()[:3], torch.full((4,), -20.0), gaussians.harmonics), 1.0)
    with pytest.raises(SceneError, match="all 4 Gaussians"):
        Growth(4).apply(model, 10, torch.Generator())
