import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gsrl_core.reconstruct as module
from gsrl_core.capture.dataset import Capture, View, load_transforms
from gsrl_core.errors import CaptureError, SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import rotvec_to_matrix
from gsrl_core.interfaces import NullReporter
from gsrl_core.reconstruct import gates, in_base_frame, photo_beside_render, reconstruct, split_views
from gsrl_core.sections import CaptureConfig, FitConfig, QualityConfig
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.ply import read_ply
from gsrl_core.splat.raster_numba import rasterize

FIT = FitConfig(backend="numba", steps=60, max_gaussians=400, sh_degree=1, densify_every=20, checkpoint_every=10)
THRESHOLDS = QualityConfig(min_psnr=10)
CAPTURE = CaptureConfig(max_image_side=64, held_out_every=4)
BASE_FROM_SCAN = torch.eye(4, dtype=torch.float64)
BASE_FROM_SCAN[:3, :3] = 0.5 * rotvec_to_matrix(torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64))
BASE_FROM_SCAN[:3, 3] = torch.tensor([0.3, 0.2, -0.1])
SCALE = {"metres_per_unit": 0.5, "residual_mm": 0.4, "tags": 3, "frame": "robot_base", "note": ""}


@pytest.fixture
def scan(tmp_path):
    """A folder of nine rendered photos, and the Capture that structure from motion would make of it."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(700, 3, generator=generator) * torch.tensor([2, 2, 0.2]) - torch.tensor([1, 1, 0])
    colors = 0.5 + 0.4 * torch.sin(6 * means + torch.tensor([0.0, 1.0, 2.0]))
    truth = Gaussians(
        means, torch.randn(700, 4, generator=generator), torch.full((700, 3), -2.6), torch.full((700,), 3.0),
        colors_to_harmonics(colors),
    )  # fmt: skip
    folder = tmp_path / "photos"
    folder.mkdir()
    cameras = []
    for i in range(9):
        angle = 2 * math.pi * i / 9
        eye = torch.tensor([1.4 * math.cos(angle), 1.4 * math.sin(angle), 1.5])
        size = (64, 48) if i % 2 else (48, 64)
        view = look_at(eye, torch.zeros(3))
        cameras.append(Camera(view[None], intrinsics(60, 60, size[0] / 2, size[1] / 2)[None], *size))
        rgb = rasterize(*truth.tensors(), view, cameras[-1].K[0], *size, torch.zeros(3))[0]
        Image.fromarray((rgb.clamp(0, 1).numpy() * 255).astype(np.uint8)).save(folder / f"photo_{i}.png")
    residuals = {"registered": 9, "total": 9, "not_registered": [], "reprojection_px": 0.3, "track_length": 4.0}
    chosen = torch.randperm(700, generator=generator)[:120]
    return folder, Capture(
        images=tuple(sorted(folder.iterdir())), cameras=tuple(cameras), points=means[chosen],
        colors=(colors[chosen] * 255).to(torch.uint8), residuals=residuals,
    )  # fmt: skip


@pytest.fixture
def patched(scan, monkeypatch):
    """Structure from motion answers with the known cameras and counts its calls; tags are where they should be."""
    folder, capture = scan
    calls = []

    def estimate(files, workspace, image_side, **_):
        calls.append(image_side)
        return capture

    def align(found, layout, marker_size):
        return Capture(
            found.images, found.cameras, found.points, found.colors, BASE_FROM_SCAN, {**found.residuals, "scale": SCALE}
        )

    monkeypatch.setattr(module, "estimate_cameras", estimate)
    monkeypatch.setattr(module, "align_capture", align)
    return folder, calls


def test_all_files_are_written_and_agree(patched, tmp_path):
    folder, _ = patched
    out = tmp_path / "out"
    quality = reconstruct(folder, out, CAPTURE, FIT, THRESHOLDS, NullReporter())
    assert sorted(p.name for p in out.iterdir()) == [
        "images", "photo_render.png", "quality.json", "scene.ply", "sparse_points.ply", "transforms.json",
    ]  # fmt: skip
    assert json.loads((out / "quality.json").read_text()) == quality
    assert quality["registered"] == quality["total"] == 9 and quality["scale"] == SCALE
    assert list(quality["held_out"]) == ["photo_0.png", "photo_4.png", "photo_8.png"]
    assert quality["psnr"] == pytest.approx(np.mean([v["psnr"] for v in quality["held_out"].values()]))
    assert quality["psnr"] > 14 and 0.2 < quality["ssim"] < 1
    assert quality["lpips"] is None and "weights" in quality["lpips_reason"]
    assert all(gate["passed"] for gate in quality["gates"])
    again = load_transforms(out / "transforms.json")
    assert [image.name for image in again.images] == [f"photo_{i}.png" for i in range(9)]
    assert all(image.is_relative_to(out) for image in again.images)
    assert quality["base_from_scan"] == BASE_FROM_SCAN.tolist() and again.base_from_scan is None
    # Cameras and splats are in one frame: the held-out camera sees the held-out photo.
    gaussians = read_ply(out / "scene.ply")
    assert len(gaussians) == quality["gaussians"]
    camera = again.cameras[4]
    view = camera.world_to_camera[0]
    rgb = rasterize(*gaussians.tensors(), view, camera.K[0], camera.width, camera.height, torch.zeros(3))[0]
    photo = torch.from_numpy(np.array(Image.open(folder / "photo_4.png"))).float() / 255
    assert module.psnr(rgb.clamp(0, 1), photo) == pytest.approx(quality["held_out"]["photo_4.png"]["psnr"], abs=0.05)
    with Image.open(out / "photo_render.png") as sheet:
        assert sheet.size == (96, 3 * 64)


class StopError(Exception):
    pass


def test_a_killed_reconstruction_goes_on_without_new_cameras(patched, tmp_path, monkeypatch):
    folder, calls = patched
    monkeypatch.setattr("gsrl_core.splat.fit.METRICS_EVERY", 40)

    class Stopper(NullReporter):
        def metrics(self, values, step):
            if step == 40:
                raise StopError

    out = tmp_path / "out"
    with pytest.raises(StopError):
        reconstruct(folder, out, CAPTURE, FIT, THRESHOLDS, Stopper())
    assert not (out / "quality.json").exists()
    assert torch.load(out / ".work" / "fit.pt", weights_only=True)["step"] == 30
    steps = []

    class Listener(NullReporter):
        def metrics(self, values, step):
            steps.append(step)

    resumed = reconstruct(folder, out, CAPTURE, FIT, THRESHOLDS, Listener())
    assert steps == [40, 60]
    assert len(calls) == 1 and not (out / ".work").exists()
    whole = reconstruct(folder, tmp_path / "whole", CAPTURE, FIT, THRESHOLDS, NullReporter())
    assert (out / "scene.ply").read_bytes() == (tmp_path / "whole" / "scene.ply").read_bytes()
    assert resumed["psnr"] == whole["psnr"]


def test_changed_photos_are_registered_again(patched, tmp_path, monkeypatch):
    folder, calls = patched
    out = tmp_path / "out"

    class Stopper(NullReporter):
        def metrics(self, values, step):
            raise StopError

    with pytest.raises(StopError):
        reconstruct(folder, out, CAPTURE, FIT, THRESHOLDS, Stopper())
    Image.new("RGB", (48, 64), (9, 9, 9)).save(folder / "photo_2.png")
    reconstruct(folder, out, CAPTURE, FIT, THRESHOLDS, NullReporter())
    assert len(calls) == 2


def test_progress_runs_from_nothing_to_one(patched, tmp_path):
    folder, _ = patched
    fractions = []

    class Listener(NullReporter):
        def progress(self, fraction, message):
            fractions.append(fraction)

    reconstruct(folder, tmp_path / "out", CAPTURE, FIT, THRESHOLDS, Listener())
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_gsplat_without_cuda_is_refused(patched, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SceneError, match=r"fit\.backend=numba"):
        reconstruct(
            patched[0],
            tmp_path / "out",
            CAPTURE,
            FIT.model_copy(update={"backend": "gsplat"}),
            THRESHOLDS,
            NullReporter(),
        )


def views(*names):
    camera = Camera(torch.eye(4)[None], torch.eye(3)[None], 4, 4)
    return [View(name, torch.zeros(4, 4, 3, dtype=torch.uint8), camera) for name in names]


def test_held_out_photos_are_counted_among_all_photos():
    photos = [f"{i}.jpg" for i in range(10)]
    placed = views(*(name for name in photos if name not in ("1.jpg", "4.jpg")))
    held_out, training = split_views(placed, photos, 4)
    assert [v.name for v in held_out] == ["0.jpg", "8.jpg"]
    assert [v.name for v in training] == ["2.jpg", "3.jpg", "5.jpg", "6.jpg", "7.jpg", "9.jpg"]


def test_base_frame_by_hand():
    one = Gaussians(
        torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0]]), torch.zeros(1, 3), torch.zeros(1),
        torch.zeros(1, 4, 3),
    )  # fmt: skip
    quarter_turn = torch.tensor([[0.0, -2, 0, 5], [2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]], dtype=torch.float64)
    moved = in_base_frame(one, quarter_turn)
    assert moved.means[0].tolist() == pytest.approx([5, 2, 0], abs=1e-6)
    assert moved.log_scales[0].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert in_base_frame(one, None) is one


def test_pictures_of_different_shapes_share_a_sheet():
    tall, wide = torch.ones(6, 4, 3, dtype=torch.uint8), torch.ones(4, 6, 3, dtype=torch.uint8)
    sheet = photo_beside_render([(tall, tall), (wide, wide)])
    assert sheet.shape == (10, 12, 3)
    assert sheet[0, 7].tolist() == [1, 1, 1] and sheet[0, 8].tolist() == [0, 0, 0]


GOOD = {"registered": 20, "total": 20, "scale": SCALE, "psnr": 24.0}


@pytest.mark.parametrize(
    ("changed", "failed", "advice"),
    [
        ({}, [], ""),
        ({"psnr": 19.5}, ["psnr"], "fit.steps"),
        ({"psnr": None}, ["psnr"], "held_out_every"),
        ({"psnr": float("nan")}, ["psnr"], "fit.steps"),
        ({"registered": 15}, ["registered_fraction"], "5 of 20"),
        ({"scale": {**SCALE, "residual_mm": 7.0}}, ["scale_residual_mm"], "disagree"),
        (
            {"scale": {**SCALE, "residual_mm": None, "tags": 0, "frame": "scan"}},
            ["scale_residual_mm", "tags", "frame"],
            "scale is unknown",
        ),
        ({"scale": {**SCALE, "frame": "table"}}, ["frame"], "base frame"),
        ({"scale": {**SCALE, "tags": 1}}, ["tags"], "spread more tags"),
    ],
)
def test_gates(changed, failed, advice):
    found = gates({**GOOD, **changed}, QualityConfig(min_psnr=20, max_scale_residual_mm=5, min_registered=0.8))
    assert [gate["name"] for gate in found if not gate["passed"]] == failed
    assert all(bool(gate["advice"]) != gate["passed"] for gate in found)
    assert not advice or advice in next(gate["advice"] for gate in found if not gate["passed"])


@pytest.mark.parametrize(
    ("thresholds", "failed"),
    [
        ({"min_psnr": 25}, "psnr"),
        ({"max_scale_residual_mm": 0.3}, "scale_residual_mm"),
        ({"min_tags": 4}, "tags"),
        ({"min_registered": 1}, "registered_fraction"),
    ],
)
def test_every_threshold_acts(thresholds, failed):
    found = gates({**GOOD, "registered": 19}, QualityConfig(**thresholds))
    assert [gate["name"] for gate in found if not gate["passed"]] == [failed]


def test_photos_of_a_person_are_never_replaced(patched, tmp_path):
    folder, calls = patched
    bench = tmp_path / "bench"
    (bench / "images").mkdir(parents=True)
    for photo in folder.iterdir():
        (bench / "images" / photo.name).write_bytes(photo.read_bytes())
    for source in (bench / "images", folder):
        with pytest.raises(CaptureError, match="choose another folder"):
            reconstruct(source, bench, CAPTURE, FIT, THRESHOLDS, NullReporter())
    assert len(list((bench / "images").iterdir())) == 9 and not calls


def test_an_earlier_result_is_replaced_only_by_a_whole_one(patched, tmp_path):
    folder, _ = patched
    out = tmp_path / "out"
    short = FIT.model_copy(update={"steps": 5})
    first = reconstruct(folder, out, CAPTURE, short, THRESHOLDS, NullReporter())

    class Stopper(NullReporter):
        def metrics(self, values, step):
            raise StopError

    with pytest.raises(StopError):
        reconstruct(folder, out, CAPTURE, FIT, THRESHOLDS, Stopper())
    assert json.loads((out / "quality.json").read_text()) == first
    assert reconstruct(folder, out, CAPTURE, short, None, NullReporter())["psnr"] == first["psnr"]
    assert "gates" not in json.loads((out / "quality.json").read_text())


def repository():
    return Path(__file__).parents[2]


@pytest.mark.slow
def test_bundled_tabletop_reaches_its_quality(tmp_path):
    from gsrl_core.config import load

    config = load("laptop")
    source = repository() / "gsrl_core" / "bundled" / "capture_tabletop"
    quality = reconstruct(source, tmp_path / "out", config.capture, config.fit, config.quality, NullReporter())
    assert quality["registered"] == 30 and quality["psnr"] >= 27
    assert all(gate["passed"] for gate in quality["gates"])


@pytest.mark.slow
def test_monstree_reaches_its_quality(tmp_path):
    source = repository().parent / "shared" / "captures" / "monstree"
    if not source.is_dir():
        pytest.skip("the monstree photos are not on this machine")
    from gsrl_core.config import load

    config = load("laptop")
    quality = reconstruct(source, tmp_path / "out", config.capture, config.fit, config.quality, NullReporter())
    assert quality["registered"] == 23 and quality["psnr"] >= 17.8 and quality["ssim"] >= 0.63
    assert quality["scale"]["metres_per_unit"] is None
