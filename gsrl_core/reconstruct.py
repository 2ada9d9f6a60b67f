"""Photos of a bench to a metric 3D Gaussian model of it, with its measured quality."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsrl_core.artifacts import digest_file, write_json
from gsrl_core.capture.dataset import Capture, View, load_transforms, load_views, write_transforms
from gsrl_core.capture.frames import collect_photos
from gsrl_core.capture.markers import align_capture, load_layout
from gsrl_core.capture.sfm import estimate_cameras
from gsrl_core.config import CaptureConfig, FitConfig, section_digest
from gsrl_core.errors import SceneError
from gsrl_core.interfaces import Reporter
from gsrl_core.splat import quality
from gsrl_core.splat.fit import FitSettings, Rasterize, TrainingView, fit
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import write_ply

WORK = ".work"
_CAMERAS_SHARE = 0.25
"""How much of the progress bar the cameras take."""
_MINIMUM_REGISTERED = 0.8
_MAXIMUM_REPROJECTION_PX = 1.5
_SHOWN = 3


@dataclass(frozen=True)
class HeldOut:
    """A photo that the fit did not see, and what it drew in its place."""

    name: str
    photo: Tensor
    """float32 [h, w, 3]."""
    render: Tensor
    """float32 [h, w, 3] in [0, 1]."""


def reconstruct(
    photos: Path, out: Path, capture_config: CaptureConfig, fit_config: FitConfig, reporter: Reporter
) -> dict[str, Any]:
    """Fit 3D Gaussians to the photos in a folder (or to a video) and measure the result on photos kept out.

    Args:
        photos: folder of photos, with ``markers.json`` if there are tags at known places; or a video.
        out: gets scene.ply (robot base frame in metres if tags fix it, else the scan frame), images/ (undistorted),
            transforms.json, quality.json and photo_render.png. ``out/.work`` holds the resumable state until the end.
        capture_config: photos and tags.
        fit_config: optimisation and gates.
        reporter: hears the loss, progress, and the picture.

    Returns:
        What quality.json holds. Gates are evaluated there, and it is for the caller to stop at one that failed.

    Raises:
        CaptureError, SceneError: the photos, cameras or tags cannot be used.
    """
    started = time.monotonic()
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    capture = _cameras(photos, work, capture_config, reporter)
    views = load_views(capture, capture_config.max_image_side)
    training, held_out = _split(views, capture_config.held_out_every)
    rasterize, device = _backend(fit_config.backend)
    gaussians = _fit(capture, training, fit_config, rasterize, device, work, reporter)
    checked = [_draw(gaussians, view, rasterize, device) for view in held_out]
    document = _measure(capture, checked, gaussians, fit_config) | {"seconds": round(time.monotonic() - started, 1)}
    picture = side_by_side(checked[:_SHOWN])
    reporter.image("photo_render", picture, fit_config.steps)
    _write(out, _keep_images(capture, out), gaussians, picture, document)
    shutil.rmtree(work, ignore_errors=True)
    return document


def side_by_side(pairs: Sequence[HeldOut]) -> Tensor:
    """Photo left, render right, one row a view; uint8 [h, w, 3], padded with white."""
    rows = [torch.cat([pair.photo, torch.ones(pair.photo.shape[0], 4, 3), pair.render], 1) for pair in pairs]
    width = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1], 0, 4), value=1.0) for row in rows]
    return (torch.cat(padded).clamp(0, 1) * 255).round().to(torch.uint8)


def _cameras(photos: Path, work: Path, config: CaptureConfig, reporter: Reporter) -> Capture:
    """SfM and alignment, or what an interrupted call of the same photos and settings already found."""

    def progress(fraction: float, message: str) -> None:
        reporter.progress(_CAMERAS_SHARE * fraction, message)

    files = collect_photos(photos, work / "frames", config.max_frames, progress)
    key = section_digest(config) + "".join(digest_file(path) for path in files)
    key_file, transforms = work / "cameras.key", work / "transforms.json"
    if transforms.is_file() and key_file.is_file() and key_file.read_text() == key:
        return load_transforms(transforms)
    capture = estimate_cameras(files, work, config.sfm_image_side, progress=progress)
    layout = load_layout(photos if photos.is_dir() else photos.parent)
    capture = align_capture(capture, layout, config.marker_size)
    write_transforms(transforms, capture)
    key_file.write_text(key)
    return capture


def _split(views: Sequence[View], every: int) -> tuple[list[View], list[View]]:
    held_out = [view for index, view in enumerate(views) if index % every == 0]
    training = [view for index, view in enumerate(views) if index % every]
    if not training:
        raise SceneError(
            f"{len(views)} photos: none is left to fit after holding out every {every}th; take more photos"
        )
    return training, held_out


def _backend(name: str) -> tuple[Rasterize, torch.device]:
    if name == "gsplat" and not torch.cuda.is_available():
        raise SceneError("fit.backend=gsplat needs a CUDA device and none is here; use fit.backend=numba or auto")
    if name == "numba" or not torch.cuda.is_available():
        from gsrl_core.splat.raster_numba import rasterize

        return rasterize, torch.device("cpu")
    from gsrl_core.splat.fit_gsplat import rasterize as rasterize_on_gpu

    return rasterize_on_gpu, torch.device("cuda", 0)


def _fit(
    capture: Capture,
    views: Sequence[View],
    config: FitConfig,
    rasterize: Rasterize,
    device: torch.device,
    work: Path,
    reporter: Reporter,
) -> Gaussians:
    settings = FitSettings(
        steps=config.steps,
        max_gaussians=config.max_gaussians,
        sh_degree=config.sh_degree,
        ssim_weight=config.ssim_weight,
        densify_every=config.densify_every,
        densify_until=config.densify_until,
        seed=config.seed,
    )
    every = max(1, config.steps // 100)

    def progress(step: int, numbers: Mapping[str, float]) -> None:
        if step % every == 0 or step == config.steps:
            reporter.metrics(numbers, step)
            share = _CAMERAS_SHARE + (1 - _CAMERAS_SHARE) * step / config.steps
            loss, count = numbers["fit/loss"], int(numbers["fit/gaussians"])
            reporter.progress(share, f"fit step {step}/{config.steps}, loss {loss:.4f}, {count} Gaussians")

    training = [TrainingView(view.rgb.float() / 255, view.camera) for view in views]
    return fit(
        training, capture.points, capture.colors, settings, rasterize, workspace=work, progress=progress, device=device
    )


@torch.no_grad()
def _draw(gaussians: Gaussians, view: View, rasterize: Rasterize, device: torch.device) -> HeldOut:
    camera = view.camera.to(device)
    rgb, _, _, _ = rasterize(
        *(tensor.to(device) for tensor in gaussians.tensors()),
        camera.world_to_camera[0],
        camera.K[0],
        camera.width,
        camera.height,
        torch.zeros(3, device=device),
    )
    return HeldOut(view.name, view.rgb.float() / 255, rgb.clamp(0, 1).cpu())


def _measure(capture: Capture, checked: Sequence[HeldOut], gaussians: Gaussians, config: FitConfig) -> dict[str, Any]:
    """The fields of quality.json."""
    mean_psnr = sum(float(quality.psnr(pair.render, pair.photo)) for pair in checked) / len(checked)
    mean_ssim = sum(float(quality.ssim(pair.render, pair.photo)) for pair in checked) / len(checked)
    residuals = dict(capture.residuals)
    document = {
        "registered": residuals["registered"],
        "total": residuals["total"],
        "reprojection_px": residuals["reprojection_px"],
        "scale": residuals["scale"],
        "psnr": round(mean_psnr, 3),
        "ssim": round(mean_ssim, 4),
        "lpips": None,
        "lpips_note": "not measured: its network weights are not part of the locked packages",
        "held_out": [pair.name for pair in checked],
        "gaussians": len(gaussians),
    }
    return document | {"gates": _gates(document, config)}


def _gates(document: Mapping[str, Any], config: FitConfig) -> list[dict[str, Any]]:
    share = document["registered"] / document["total"]
    residual = document["scale"]["residual_mm"]
    frame = document["scale"]["frame"]
    more_overlap = "photograph in small steps around the bench, with more texture in view and no motion blur"
    tags = "put printed tags on the bench, note their corners in markers.json, and photograph each from several sides"
    return [
        _gate("registered", round(share, 3), f">= {_MINIMUM_REGISTERED}", share >= _MINIMUM_REGISTERED, more_overlap),
        _gate(
            "reprojection_px",
            document["reprojection_px"],
            f"<= {_MAXIMUM_REPROJECTION_PX}",
            document["reprojection_px"] <= _MAXIMUM_REPROJECTION_PX,
            "keep focus and zoom fixed while photographing",
        ),
        _gate("psnr", document["psnr"], f">= {config.min_psnr}", document["psnr"] >= config.min_psnr, more_overlap),
        _gate("frame", frame, "== robot_base", frame == "robot_base", tags),
        _gate(
            "scale_residual_mm",
            residual,
            f"<= {config.max_scale_residual_mm}",
            residual is not None and residual <= config.max_scale_residual_mm,
            tags if residual is None else "measure the tags' size and places again, and lay them flat",
        ),
    ]


def _gate(name: str, value: Any, threshold: str, passed: bool, advice: str) -> dict[str, Any]:
    return {"name": name, "value": value, "threshold": threshold, "passed": bool(passed), "advice": advice}


def _keep_images(capture: Capture, out: Path) -> Capture:
    """The capture with its undistorted photos moved from the work folder to ``out/images``, names unchanged."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for image in capture.images:
        shutil.copyfile(image, folder / image.name)
        kept.append(folder / image.name)
    return replace(capture, images=tuple(kept))


def _in_base(gaussians: Gaussians, base_from_scan: Tensor | None) -> Gaussians:
    if base_from_scan is None:
        return gaussians
    scale = float(torch.linalg.det(base_from_scan[:3, :3])) ** (1 / 3)
    return gaussians.transformed((base_from_scan[:3, :3] / scale).float(), base_from_scan[:3, 3].float(), scale)


def _write(out: Path, capture: Capture, gaussians: Gaussians, picture: Tensor, document: dict[str, Any]) -> None:
    from PIL import Image

    write_ply(out / "scene.ply", _in_base(gaussians, capture.base_from_scan))
    write_transforms(out / "transforms.json", capture)
    Image.fromarray(picture.numpy()).save(out / "photo_render.png")
    write_json(out / "quality.json", json.loads(json.dumps(document)))
