"""Posed photos, and nerfstudio's ``transforms.json`` in and out.

Pixel convention everywhere: the centre of the first pixel is (0.5, 0.5), as in COLMAP, nerfstudio and gsplat, so that
scaling an image by s multiplies the first two rows of K by s. OpenCV counts from (0, 0): see ``opencv_intrinsics``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gsrl_core.errors import CaptureError
from gsrl_core.geometry.camera import Camera, from_opengl_c2w, intrinsics, to_opengl_c2w

_PINHOLE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
_DISTORTION_KEYS = ("k1", "k2", "p1", "p2", "k3")


@dataclass(frozen=True)
class Capture:
    """A set of posed pinhole photos and the sparse points that they see, in the scan frame of the reconstruction."""

    images: tuple[Path, ...]
    """One file per photo, upright; ``name`` is the photo's own file name."""
    cameras: tuple[Camera, ...]
    """One Camera of leading size 1 per photo, since portrait and landscape differ in size; scan frame."""
    points: Tensor
    """float32 [P, 3], scan frame."""
    colors: Tensor
    """uint8 [P, 3]."""
    base_from_scan: Tensor | None = None
    """float64 [4, 4] similarity to the robot base frame in metres, or None when no known tags were seen."""
    residuals: Mapping[str, Any] = field(default_factory=dict)
    """What the reconstruction measured about itself: registered, total, reprojection_px, scale {...}."""
    distortion: Tensor | None = None
    """float64 [C, 5], OpenCV order (k1, k2, p1, p2, k3); ``load_views`` removes it. None: the photos are pinhole."""

    def __post_init__(self) -> None:
        if len(self.images) != len(self.cameras):
            raise CaptureError(f"a capture of {len(self.images)} photos has {len(self.cameras)} cameras; need one each")

    @property
    def world_to_camera(self) -> Tensor:
        """float32 [C, 4, 4]: scan frame to each OpenCV camera frame."""
        return torch.cat([camera.world_to_camera for camera in self.cameras])

    @property
    def K(self) -> Tensor:  # noqa: N802 (the name of the field)
        """float32 [C, 3, 3]."""
        return torch.cat([camera.K for camera in self.cameras])


def moved(capture: Capture, similarity: Tensor) -> Capture:
    """The same capture in another frame, its ``base_from_scan`` forgotten.

    Args:
        capture: cameras and points in frame a.
        similarity: float64 [4, 4], frame b from frame a: a rotation, one scale and a translation.
    """
    scale = float(torch.linalg.det(similarity[:3, :3])) ** (1 / 3)
    rotation, translation = similarity[:3, :3] / scale, similarity[:3, 3]
    cameras = []
    for camera in capture.cameras:
        pose = camera.world_to_camera.double().clone()
        # x_camera = R x_a + t and x_b = s Q x_a + u; measured in units of b the camera sees s x_camera.
        pose[:, :3, :3] = pose[:, :3, :3] @ rotation.T
        pose[:, :3, 3] = scale * pose[:, :3, 3] - pose[:, :3, :3] @ translation
        cameras.append(Camera(pose.float(), camera.K, camera.width, camera.height))
    points = (capture.points.double() @ similarity[:3, :3].T + translation).float()
    return replace(capture, cameras=tuple(cameras), points=points, base_from_scan=None)


@dataclass(frozen=True)
class View:
    """One photo in memory with the camera of exactly that size."""

    name: str
    rgb: Tensor
    """uint8 [h, w, 3]."""
    camera: Camera
    """Leading size 1, scan frame."""


def read_photo(path: Path) -> np.ndarray:
    """Decode a photo completely, upright (EXIF orientation applied), as uint8 [h, w, 3] RGB.

    Raises:
        CaptureError: the file is missing, not an image, truncated or corrupt.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise CaptureError(f"{path}: there is no such photo") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CaptureError(
            f"{path}: cannot be decoded ({error}); allowed: whole JPEG or PNG files; copy it again or remove it"
        ) from error


def resize_to_side(image: np.ndarray, longest_side: int) -> np.ndarray:
    """Reduce [h, w, 3] so that its longest side is ``longest_side`` px (area average); never enlarges."""
    height, width = image.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def opencv_intrinsics(K: np.ndarray) -> np.ndarray:
    """The same [3, 3] intrinsics for OpenCV functions, whose first pixel centre is (0, 0)."""
    shifted = np.array(K, dtype=np.float64)
    shifted[:2, 2] -= 0.5
    return shifted


def load_views(capture: Capture, longest_side: int | None = None) -> tuple[View, ...]:
    """Read all photos of a capture as pinhole views, reduced to ``longest_side`` px with K scaled alike.

    Raises:
        CaptureError: a file cannot be decoded, or its size is not the one in the capture.
    """
    return tuple(load_view(capture, index, longest_side) for index in range(len(capture.images)))


def load_view(capture: Capture, index: int, longest_side: int | None = None) -> View:
    """One photo of ``load_views``. Raises CaptureError alike."""
    path, camera = capture.images[index], capture.cameras[index]
    image = read_photo(path)
    height, width = image.shape[:2]
    if (width, height) != (camera.width, camera.height):
        raise CaptureError(
            f"{path}: is {width}x{height} but its camera says {camera.width}x{camera.height}; "
            "the photo was changed after the reconstruction, run it again"
        )
    if capture.distortion is not None and bool((capture.distortion[index] != 0).any()):
        image = cv2.undistort(image, opencv_intrinsics(camera.K[0].numpy()), capture.distortion[index].numpy())
    if longest_side is not None:
        image = resize_to_side(image, longest_side)
    height, width = image.shape[:2]
    return View(path.name, torch.from_numpy(np.ascontiguousarray(image)), camera.resized(width, height))


def write_transforms(path: Path, capture: Capture) -> None:
    """Write ``path`` (nerfstudio transforms.json, OpenGL camera_to_world) and its sparse point cloud beside it."""
    import trimesh

    path.parent.mkdir(parents=True, exist_ok=True)
    cloud = path.with_name("sparse_points.ply")
    trimesh.PointCloud(capture.points.numpy(), colors=capture.colors.numpy()).export(cloud)
    document: dict[str, Any] = {
        "camera_model": "OPENCV" if capture.distortion is not None else "PINHOLE",
        "ply_file_path": cloud.name,
        "frames": [_frame(capture, index, path.parent) for index in range(len(capture.images))],
        "base_from_scan": None if capture.base_from_scan is None else capture.base_from_scan.tolist(),
        "residuals": dict(capture.residuals),
    }
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(document, indent=1))
    temporary.replace(path)


def _frame(capture: Capture, index: int, folder: Path) -> dict[str, Any]:
    camera = capture.cameras[index]
    K = camera.K[0].tolist()
    frame = {
        "file_path": _relative(capture.images[index], folder),
        "w": camera.width,
        "h": camera.height,
        "fl_x": K[0][0],
        "fl_y": K[1][1],
        "cx": K[0][2],
        "cy": K[1][2],
        "transform_matrix": to_opengl_c2w(camera.world_to_camera[0].double()).tolist(),
    }
    if capture.distortion is not None:
        frame |= dict(zip(_DISTORTION_KEYS, capture.distortion[index].tolist(), strict=True))
    return frame


def _relative(file: Path, folder: Path) -> str:
    try:
        return file.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return file.resolve().as_posix()


def load_transforms(path: Path) -> Capture:
    """Read a nerfstudio ``transforms.json`` (own, ns-process-data, Polycam, Record3D, KIRI exports).

    Intrinsics may be global or per frame. ``applied_transform`` is part of the stored poses and points, so it stays.

    Raises:
        CaptureError: not JSON, a key is missing, a photo is missing, or the lens model is not a perspective one.
    """
    try:
        document = json.loads(path.read_text())
        frames = document["frames"]
        model = document.get("camera_model", "PINHOLE")
        if model not in _PINHOLE_MODELS:
            raise CaptureError(f"{path}: camera_model {model!r}; allowed: {', '.join(_PINHOLE_MODELS)}")
        images = tuple(_find_image(path.parent, frame["file_path"]) for frame in frames)
        cameras = tuple(_read_camera({**document, **frame}) for frame in frames)
    except FileNotFoundError as error:
        raise CaptureError(f"{path}: there is no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CaptureError(f"{path}: is not valid JSON ({error})") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(
            f"{path}: is not a nerfstudio transforms.json ({type(error).__name__}: {error}); needed are frames, each "
            "with file_path and transform_matrix (4x4), and fl_x, fl_y, cx, cy, w, h in the frame or globally"
        ) from error
    lens = torch.tensor(
        [[float({**document, **frame}.get(key, 0.0)) for key in _DISTORTION_KEYS] for frame in frames],
        dtype=torch.float64,
    )
    points, colors = _read_points(path.parent, document.get("ply_file_path"))
    base_from_scan = document.get("base_from_scan")
    return Capture(
        images=images,
        cameras=cameras,
        points=points,
        colors=colors,
        base_from_scan=None if base_from_scan is None else torch.tensor(base_from_scan, dtype=torch.float64),
        residuals=document.get("residuals", {}),
        distortion=lens if bool((lens != 0).any()) else None,
    )


def _read_camera(values: Mapping[str, Any]) -> Camera:
    K = intrinsics(values["fl_x"], values.get("fl_y", values["fl_x"]), values["cx"], values["cy"])
    camera_to_world = torch.tensor(values["transform_matrix"], dtype=torch.float64)
    if camera_to_world.shape != (4, 4):
        raise ValueError(f"transform_matrix has shape {tuple(camera_to_world.shape)}")
    return Camera(from_opengl_c2w(camera_to_world).float()[None], K[None], int(values["w"]), int(values["h"]))


def _find_image(folder: Path, file_path: str) -> Path:
    candidate = folder / file_path
    # Some exporters (instant-ngp, Blender sets) leave the extension out.
    for choice in (candidate, *(candidate.with_name(candidate.name + end) for end in (".png", ".jpg", ".jpeg"))):
        if choice.is_file():
            return choice
    raise CaptureError(f"{candidate}: named in transforms.json but not there; copy the photos beside it")


def _read_points(folder: Path, ply_file_path: str | None) -> tuple[Tensor, Tensor]:
    if ply_file_path is None:
        return torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8)
    import trimesh

    try:
        cloud = trimesh.load(folder / ply_file_path)
        points = torch.tensor(np.asarray(cloud.vertices), dtype=torch.float32)
        colors = torch.tensor(np.asarray(cloud.visual.vertex_colors)[:, :3], dtype=torch.uint8)
    except (OSError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise CaptureError(f"{folder / ply_file_path}: is not a readable point cloud ({error})") from error
    return points, colors
