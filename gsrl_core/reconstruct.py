"""Photos of a bench -> cameras -> 3D Gaussians, with the quality measured on photos that the fit never saw."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gsrl_core.artifacts import digest_file, write_bytes, write_json
from gsrl_core.capture.dataset import Capture, View, load_transforms, load_views, moved, write_transforms
from gsrl_core.capture.frames import collect_photos
from gsrl_core.capture.markers import MARKERS_FILE, align_capture, load_layout
from gsrl_core.capture.sfm import estimate_cameras
from gsrl_core.errors import CaptureError, SceneError
from gsrl_core.interfaces import Reporter
from gsrl_core.sections import CaptureConfig, FitConfig, QualityConfig
from gsrl_core.splat.fit import FitResult, FitSettings, RasterizeFunction, fit
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import write_ply
from gsrl_core.splat.quality import LPIPS_REASON, psnr, ssim
from gsrl_core.splat.shape import NEEDLE_RANK, effective_rank

QUALITY = "quality.json"
WORKSPACE = ".work"
"""Folder inside ``out`` that holds unfinished work; while it is there, the other files are of an earlier result."""
PICTURES_SHOWN = 6
_CAPTURE_SHARE, _FIT_SHARE = 0.15, 0.8


def reconstruct(
    photos: Path,
    out: Path,
    capture_config: CaptureConfig,
    fit_config: FitConfig,
    thresholds: QualityConfig | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Fit a scene to a folder of photos or a video; called again after a crash, it goes on where it was.

    Writes ``scene.ply``, ``images/`` and ``transforms.json`` with ``sparse_points.ply``, all in one frame that
    ``quality.json`` names under ``scale`` (the robot's base or the table, in metres, as far as tags tell it; else that
    of the scan), ``photo_render.png`` and, last, ``quality.json``.

    Args:
        photos: folder of photos, optionally with markers.json, or a video file.
        out: folder to write.
        capture_config: sizes, tags, which photos are held out.
        fit_config: steps, number of Gaussians.
        thresholds: of the gates in quality.json; None leaves them out, for a caller that judges later.
        reporter: hears progress, metrics and the final pictures.

    Returns:
        The content of quality.json.

    Raises:
        CaptureError: the photos cannot be read or placed, or ``out`` holds pictures that are not this function's.
        SceneError: the fit failed, or the backend cannot run here.
    """
    begin = time.monotonic()
    rasterize, device = _backend(fit_config.backend)
    workspace = out / WORKSPACE
    _check_images_are_ours(photos, out)
    workspace.mkdir(parents=True, exist_ok=True)
    capture = _capture(photos, workspace / "capture", capture_config, reporter)
    views = load_views(capture, capture_config.max_image_side)
    held_out, training = split_views(views, capture.residuals["photos"], capture_config.held_out_every)
    settings = FitSettings(**fit_config.model_dump(exclude={"backend"}))
    fitted = fit(
        training, capture.points, capture.colors, settings, rasterize, workspace, _FitProgress(reporter), device
    )
    scores = _scores(fitted.gaussians, held_out, rasterize, device)
    _write_outputs(out, capture, fitted.gaussians, scores, reporter)
    quality = _quality(capture, fitted, scores, capture_config, fit_config, time.monotonic() - begin)
    if thresholds is not None:
        quality["gates"] = gates(quality, thresholds)
    write_json(out / QUALITY, quality)
    shutil.rmtree(workspace)
    reporter.progress(1.0, f"{len(fitted.gaussians)} Gaussians, {len(scores)} photos held out")
    return quality


def _check_images_are_ours(photos: Path, out: Path) -> None:
    """``out / images`` is replaced in the end: it must not be what a person put there."""
    images, source = (out / "images").resolve(), photos.resolve()
    if source == images or images in source.parents:
        raise CaptureError(f"{photos} lies where undistorted copies would be written; choose another folder than {out}")
    if images.is_dir() and not ((out / QUALITY).is_file() or (out / WORKSPACE).is_dir()):
        raise CaptureError(f"{out} holds a folder images that is not of a reconstruction; choose another folder")


def split_views(views: Sequence[View], photos: Sequence[str], every: int) -> tuple[list[View], list[View]]:
    """(held out, training): photo 0, ``every``, 2 ``every``, ... of all ``photos`` names are held out.

    Counting all photos, and not those that could be placed, keeps the choice the same from run to run.
    """
    names = set(photos[::every])
    held_out = [view for view in views if view.name in names]
    return held_out, [view for view in views if view.name not in names]


class _FitProgress:
    """The fit's part of the progress bar."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._reporter.metrics(values, step)

    def progress(self, fraction: float, message: str) -> None:
        self._reporter.progress(_CAPTURE_SHARE + _FIT_SHARE * fraction, message)


def _backend(name: str) -> tuple[RasterizeFunction, str]:
    cuda = torch.cuda.is_available()
    if name == "gsplat" and not cuda:
        raise SceneError("fit.backend=gsplat needs a CUDA device and PyTorch sees none; use fit.backend=numba (CPU)")
    if name == "numba" or not cuda:
        from gsrl_core.splat.raster_numba import rasterize

        return rasterize, "cpu"
    from gsrl_core.splat.fit_gsplat import rasterize_gsplat

    return rasterize_gsplat, "cuda"


def _capture(photos: Path, folder: Path, config: CaptureConfig, reporter: Reporter) -> Capture:
    """Cameras and tags, from ``folder`` when a killed run left them there for the same photos and settings."""

    def progress(fraction: float, message: str) -> None:
        reporter.progress(_CAPTURE_SHARE * fraction, message)

    folder.mkdir(exist_ok=True)
    files = collect_photos(photos, folder / "frames", config.max_frames, progress)
    source = photos if photos.is_dir() else photos.parent
    key = {
        "photos": {file.name: digest_file(file) for file in [*files, source / MARKERS_FILE] if file.is_file()},
        "settings": config.model_dump(mode="json", include={"sfm_image_side", "max_frames", "marker_size"}),
    }
    key_file, transforms = folder / "key.json", folder / "transforms.json"
    done = transforms.is_file() and key_file.is_file() and json.loads(key_file.read_text()) == key
    if not done:
        transforms.unlink(missing_ok=True)
        layout = load_layout(source)
        capture = estimate_cameras(files, folder, config.sfm_image_side, progress=progress)
        capture = align_capture(capture, layout, config.marker_size)
        names = sorted(file.name for file in files)
        write_json(key_file, key)
        write_transforms(transforms, replace(capture, residuals={**capture.residuals, "photos": names}))
    return load_transforms(transforms)  # in any case, so that a resumed run sees the same rounded numbers


class _Score:
    """One held-out photo beside its rendering."""

    def __init__(self, view: View, picture: Tensor) -> None:
        photo = view.rgb.float() / 255
        self.name, self.psnr, self.ssim = view.name, psnr(picture, photo), float(ssim(picture, photo))
        self.photo, self.picture = view.rgb, (picture * 255 + 0.5).to(torch.uint8)


@torch.no_grad()
def _scores(gaussians: Gaussians, views: Sequence[View], rasterize: RasterizeFunction, device: str) -> list[_Score]:
    placed = gaussians.to(device)
    scores = []
    for view in views:
        camera = view.camera.to(device)
        rgb = rasterize(
            *placed.tensors(), camera.world_to_camera[0], camera.K[0], camera.width, camera.height,
            torch.zeros(3, device=device),
        )[0]  # fmt: skip
        scores.append(_Score(view, rgb.clamp(0, 1).cpu()))
    return scores


def _write_outputs(
    out: Path, capture: Capture, gaussians: Gaussians, scores: Sequence[_Score], reporter: Reporter
) -> None:
    (out / QUALITY).unlink(missing_ok=True)  # it says that the other files are complete
    images = out / "images"
    if images.is_dir():
        shutil.rmtree(images)
    images.mkdir()
    for image in capture.images:
        shutil.copy2(image, images / image.name)
    kept = replace(capture, images=tuple(images / image.name for image in capture.images))
    if capture.base_from_scan is not None:
        kept = moved(kept, capture.base_from_scan)
    write_transforms(out / "transforms.json", kept)
    write_ply(out / "scene.ply", in_base_frame(gaussians, capture.base_from_scan))
    if scores:
        sheet = photo_beside_render([(score.photo, score.picture) for score in scores[:PICTURES_SHOWN]])
        content = io.BytesIO()
        Image.fromarray(sheet.numpy()).save(content, format="PNG")
        write_bytes(out / "photo_render.png", content.getvalue())
        reporter.image("photo_render", sheet, 0)


def in_base_frame(gaussians: Gaussians, base_from_scan: Tensor | None) -> Gaussians:
    """Gaussians moved by the similarity ``base_from_scan`` [4, 4]; as they are when it is unknown."""
    if base_from_scan is None:
        return gaussians
    scale = float(torch.linalg.det(base_from_scan[:3, :3])) ** (1 / 3)
    return gaussians.transformed(base_from_scan[:3, :3] / scale, base_from_scan[:3, 3], scale)


def photo_beside_render(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One picture uint8 [h, w, 3]: a row for each (photo, render), both uint8 [h, w, 3], padded to one width."""
    rows = [torch.cat(pair, dim=1) for pair in pairs]
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows])


def _quality(
    capture: Capture,
    fitted: FitResult,
    scores: Sequence[_Score],
    capture_config: CaptureConfig,
    fit_config: FitConfig,
    seconds: float,
) -> dict[str, Any]:
    residuals = capture.residuals
    quality: dict[str, Any] = {key: residuals[key] for key in ("registered", "total", "reprojection_px", "scale")}
    return quality | {
        "base_from_scan": None if capture.base_from_scan is None else capture.base_from_scan.tolist(),
        "not_registered": residuals["not_registered"],
        "psnr": float(np.mean([score.psnr for score in scores])) if scores else None,
        "ssim": float(np.mean([score.ssim for score in scores])) if scores else None,
        "lpips": None,
        "lpips_reason": LPIPS_REASON,
        "held_out": {score.name: {"psnr": score.psnr, "ssim": score.ssim} for score in scores},
        "image_side_px": capture_config.max_image_side,
        "gaussians": len(fitted.gaussians),
        "needles": float((effective_rank(fitted.gaussians.log_scales) < NEEDLE_RANK).float().mean()),
        "steps": fit_config.steps,
        "fit_seconds": fitted.seconds,
        "seconds": seconds,
    }


def gates(quality: Mapping[str, Any], thresholds: QualityConfig) -> list[dict[str, Any]]:
    """What must hold before a robot is put into the scene; each entry has name, value, threshold, passed and advice.

    An unknown value never passes.

    Args:
        quality: content of quality.json.
        thresholds: what is asked for; may differ from those of the time when the file was written.
    """
    scale, total, mean = quality["scale"], quality["total"], quality["psnr"]
    fraction = quality["registered"] / total

    def gate(name: str, value: Any, threshold: Any, passed: Callable[[Any], bool], advice: str) -> dict[str, Any]:
        good = value is not None and passed(value)
        return {"name": name, "value": value, "threshold": threshold, "passed": good, "advice": "" if good else advice}

    return [
        gate(
            "registered_fraction", fraction, thresholds.min_registered,
            lambda value: value >= thresholds.min_registered,
            f"{total - quality['registered']} of {total} photos could not be placed; photograph with more overlap "
            "(60 % between neighbours) or remove the photos named in not_registered",
        ),
        gate(
            "psnr", mean, thresholds.min_psnr, lambda value: value >= thresholds.min_psnr,
            "raise fit.steps and fit.max_gaussians, keep exposure and white balance fixed while photographing, and "
            "look at photo_render.png" if mean is not None
            else "no held-out photo could be placed; lower capture.held_out_every",
        ),
        gate(
            "scale_residual_mm", scale["residual_mm"], thresholds.max_scale_residual_mm,
            lambda value: value <= thresholds.max_scale_residual_mm,
            "the tags disagree; measure the edge and corners of the tags again and keep them flat"
            if scale["residual_mm"] is not None
            else "the scale is unknown; put ArUco tags on the bench and give capture.marker_size or markers.json",
        ),
        gate(
            "tags", scale["tags"], thresholds.min_tags, lambda value: value >= thresholds.min_tags,
            "spread more tags over the bench, flat, each seen in several photos, and name them in markers.json",
        ),
        gate(
            "frame", scale["frame"], "robot_base", lambda value: value == "robot_base",
            "the robot base is not located; give the corners of the tags in the base frame in markers.json",
        ),
    ]  # fmt: skip
