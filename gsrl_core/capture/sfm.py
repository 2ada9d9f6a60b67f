"""Cameras from photos: prepares them for COLMAP, runs it in a subprocess, undistorts the photos it could place."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from gsrl_core.capture.dataset import Capture, read_photo, resize_to_side
from gsrl_core.capture.frames import MINIMUM_PHOTOS, Progress, silent
from gsrl_core.errors import CaptureError
from gsrl_core.geometry.camera import Camera

EXHAUSTIVE_LIMIT = 80
"""Up to so many photos every pair is matched."""
_NEIGHBOURS, _OVERLAP = 20, 6
_EXIF_IFD, _EXIF_FOCAL_35MM, _EXIF_MAKE, _EXIF_MODEL = 0x8769, 0xA405, 0x010F, 0x0110
_FILM_WIDTH_MM = 36.0


def estimate_cameras(
    photos: Sequence[Path], workspace: Path, image_side: int = 1600, seed: int = 0, progress: Progress = silent
) -> Capture:
    """Find pose, focal length and lens of each photo and a sparse point cloud; the scan frame has no known scale.

    Photos of the same size and lens share a camera, so portrait and landscape may be mixed. Undistorted copies under
    the photos' own names are written to ``workspace/images``, COLMAP's files to ``workspace/sfm``.

    Args:
        photos: at least three files with different names.
        workspace: folder for results.
        image_side: longest side at which features are searched (px).
        seed: of RANSAC.
        progress: told a fraction and a text.

    Raises:
        CaptureError: a photo cannot be decoded, fewer than three could be placed, or COLMAP crashed.
    """
    _check_names(photos)
    folder = workspace / "sfm"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    groups = _prepare(photos, folder / "images", image_side)
    request = {
        "folder": str(folder.resolve()),
        "groups": groups,
        "seed": seed,
        "exhaustive_limit": EXHAUSTIVE_LIMIT,
        "neighbours": _NEIGHBOURS,
        "overlap": _OVERLAP,
    }
    model = _run_worker(folder, request, progress)
    if len(model["names"]) < MINIMUM_PHOTOS:
        raise CaptureError(
            f"only {len(model['names'])} of {len(photos)} photos could be placed together: they do not overlap enough; "
            "take 20 or more photos around the bench with at least 60 % overlap between neighbours, sharp and with "
            "texture in view (papers, books, tags), without moving anything"
        )
    return _capture(photos, workspace / "images", model)


def focal_prior(focal_35mm: float, width: int, height: int) -> float:
    """Focal length in px from EXIF's 35 mm equivalent, whose film is 36 mm along the longest side."""
    return focal_35mm / _FILM_WIDTH_MM * max(width, height)


def _check_names(photos: Sequence[Path]) -> None:
    if len(photos) < MINIMUM_PHOTOS:
        raise CaptureError(f"{len(photos)} photos given; at least {MINIMUM_PHOTOS} that overlap are needed")
    names = [photo.name for photo in photos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CaptureError(f"photos of the same name: {', '.join(twice[:5])}; rename them so that each is unique")


def _prepare(photos: Sequence[Path], folder: Path, image_side: int) -> list[dict[str, Any]]:
    """Write reduced upright copies named by index; returns the groups that share a camera."""
    for old in folder.glob("*.png"):
        old.unlink()
    groups: dict[tuple, dict[str, Any]] = {}
    for index, photo in enumerate(photos):
        image = read_photo(photo)
        device, focal_35mm = _exif_lens(photo)
        full = image.shape[1::-1]
        reduced = resize_to_side(image, image_side)
        height, width = reduced.shape[:2]
        focal = focal_prior(focal_35mm, width, height) if focal_35mm else None
        group = groups.setdefault((*full, device, focal_35mm), {"size": (width, height), "focal": focal, "names": []})
        group["names"].append(f"{index:05d}.png")
        if not cv2.imwrite(str(folder / group["names"][-1]), reduced[..., ::-1], (cv2.IMWRITE_PNG_COMPRESSION, 1)):
            raise CaptureError(f"{folder}: cannot be written to; free disk space or choose another folder")
    return list(groups.values())


def _exif_lens(photo: Path) -> tuple[str, float | None]:
    """Maker and model, and the 35 mm equivalent focal length (mm) if the photo states one."""
    try:
        with Image.open(photo) as image:
            exif = image.getexif()
        focal = float(exif.get_ifd(_EXIF_IFD).get(_EXIF_FOCAL_35MM) or 0)
        return f"{exif.get(_EXIF_MAKE)} {exif.get(_EXIF_MODEL)}", focal if 0 < focal < math.inf else None
    except (ValueError, TypeError, SyntaxError, struct.error, OSError):
        return "", None  # a broken tag: the pixels were read, and the focal length is estimated anyway


def _run_worker(folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, np.ndarray]:
    """Run COLMAP and read its answer; whatever it writes to stderr is quoted if it fails."""
    answer = folder / "model.npz"
    answer.unlink(missing_ok=True)
    request_path = folder / "request.json"
    request_path.write_text(json.dumps(request))
    source = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "gsrl_core.capture.sfm_worker", str(request_path.resolve())]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    values = json.loads(line)
                    progress(values["fraction"], values["message"])
            code = process.wait()
        finally:
            process.kill()
        if code != 0 or not answer.exists():
            errors.seek(0)
            text = errors.read()
            log = folder / "colmap.log"
            log.write_text(text)
            last = (text.strip().splitlines() or ["it said nothing"])[-1]
            raise CaptureError(f"structure from motion (COLMAP) stopped with code {code}: {last} (all of it: {log})")
    with np.load(answer) as arrays:
        return dict(arrays)


def _capture(photos: Sequence[Path], folder: Path, model: dict[str, np.ndarray]) -> Capture:
    folder.mkdir(parents=True, exist_ok=True)
    images, cameras = [], []
    chosen = [photos[int(Path(str(name)).stem)] for name in model["names"]]
    for index, photo in enumerate(chosen):
        image = read_photo(photo)
        height, width = image.shape[:2]
        focal, cx, cy, k1 = model["lens"][index]
        stretch = np.array([width, height]) / model["size"][index]
        K = np.array([[focal * stretch[0], 0, cx * stretch[0]], [0, focal * stretch[1], cy * stretch[1]], [0, 0, 1]])
        pinhole, K = undistort(image, K, float(k1))
        images.append(folder / photo.name)
        Image.fromarray(pinhole).save(images[-1], **_SAVE_OPTIONS.get(photo.suffix.lower(), {}))
        world_to_camera = torch.eye(4)
        world_to_camera[:3] = torch.from_numpy(model["world_to_camera"][index])
        cameras.append(Camera(world_to_camera[None], torch.from_numpy(K).float()[None], width, height))
    left_out = sorted({photo.name for photo in photos} - {photo.name for photo in chosen})
    return Capture(
        images=tuple(images),
        cameras=tuple(cameras),
        points=torch.from_numpy(model["points"]),
        colors=torch.from_numpy(model["colors"]),
        residuals={
            "registered": len(chosen),
            "total": len(photos),
            "not_registered": left_out,
            "reprojection_px": float(model["reprojection_px"]),
            "track_length": float(model["track_length"]),
        },
    )


_SAVE_OPTIONS = {".jpg": {"quality": 97, "subsampling": 0}, ".jpeg": {"quality": 97, "subsampling": 0}}


def undistort(image: np.ndarray, K: np.ndarray, k1: float) -> tuple[np.ndarray, np.ndarray]:
    """Remove one-parameter radial distortion at the same image size, zoomed so that no empty border appears.

    Args:
        image: uint8 [h, w, 3].
        K: [3, 3] of the distorted picture (pixel centres at +0.5).
        k1: x_lens = x (1 + k1 r^2), COLMAP's SIMPLE_RADIAL.

    Returns:
        The pinhole picture [h, w, 3] and its K [3, 3]; square pixels and the principal point are kept.
    """
    height, width = image.shape[:2]
    zoom = _border_zoom(K, k1, width, height)
    new_K = K.copy()
    new_K[0, 0] *= zoom
    new_K[1, 1] *= zoom
    rows, columns = np.mgrid[:height, :width].astype(np.float64) + 0.5
    x, y = (columns - new_K[0, 2]) / new_K[0, 0], (rows - new_K[1, 2]) / new_K[1, 1]
    stretch = 1 + k1 * (x * x + y * y)
    map_x = (K[0, 0] * x * stretch + K[0, 2] - 0.5).astype(np.float32)
    map_y = (K[1, 1] * y * stretch + K[1, 2] - 0.5).astype(np.float32)
    pinhole = cv2.remap(image, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return pinhole, new_K


def _border_zoom(K: np.ndarray, k1: float, width: int, height: int) -> float:
    """Smallest focal factor >= 1 at which every pinhole border point comes from inside the distorted picture."""
    across, down = np.linspace(0, width, 65), np.linspace(0, height, 65)
    border = np.concatenate(
        [np.stack([across, np.full(65, edge)], -1) for edge in (0.0, height)]
        + [np.stack([np.full(65, edge), down], -1) for edge in (0.0, width)]
    )
    rays = (border - K[:2, 2]) / (K[0, 0], K[1, 1])
    radius2 = (rays**2).sum(-1)
    # With the focal length times z, the border ray shrinks to r/z and lands at r/z (1 + k1 r^2/z^2) of the picture:
    # inside if 1 + k1 r^2/z^2 <= z, which Newton solves for the worst corner.
    worst = k1 * radius2.max() if k1 > 0 else 0.0
    zoom = 1.0
    for _ in range(20):
        zoom -= (zoom**3 - zoom**2 - worst) / (3 * zoom**2 - 2 * zoom)
    return max(1.0, zoom)
