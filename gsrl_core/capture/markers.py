"""Metric scale and robot base frame from ArUco tags: detection, triangulation, alignment.

``markers.json`` in the photo folder says what the tags are::

    {"dictionary": "DICT_4X4_50", "size": 0.06, "tags": {"0": [[x, y, z], ...], ...}}

``size`` is the black square's edge in metres. ``tags`` is optional: the four corners (top left, top right, bottom
right, bottom left, as printed) of tags whose place in the robot base frame is known, in metres.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsrl_core.capture.dataset import Capture, load_view
from gsrl_core.capture.tag_corners import aruco_dictionary, find_tags
from gsrl_core.capture.triangulation import triangulate, widest_angle
from gsrl_core.errors import CaptureError
from gsrl_core.geometry.align import Similarity, plane_frame, robust_similarity
from gsrl_core.geometry.camera import Camera

MARKERS_FILE = "markers.json"
# Dictionaries that are tried when only the edge length is known; the small ones are subsets of these.
_COMMON_DICTIONARIES = ("DICT_4X4_1000", "DICT_5X5_1000", "DICT_6X6_1000", "DICT_7X7_1000", "DICT_APRILTAG_36h11")
_GUESS_PHOTOS = 8
_MISPLACED_M = 0.02
_EDGE_TOLERANCE = 0.02
_OUTLIER_PX = 3.0
_MINIMUM_ANGLE_RAD = np.radians(3.0)


@dataclass(frozen=True)
class MarkerLayout:
    """What is known about the tags before any photo is looked at."""

    dictionary: str
    size: float
    """Edge of the black square (m)."""
    corners: Mapping[int, Tensor] = field(default_factory=dict)
    """Tag id -> float64 [4, 3] in the robot base frame (m); empty if only the size is known."""


@dataclass(frozen=True)
class TagInScan:
    """One tag found in several photos."""

    corners: np.ndarray
    """float64 [4, 3], scan frame."""
    reprojection_px: float
    """RMS over corners and photos."""
    views: int

    @property
    def edges(self) -> np.ndarray:
        """The four edge lengths [4], scan units."""
        return np.linalg.norm(np.roll(self.corners, -1, axis=0) - self.corners, axis=-1)


def load_layout(folder: Path) -> MarkerLayout | None:
    """Read ``markers.json`` of a photo folder; None if there is none.

    Raises:
        CaptureError: the file is malformed, or a tag is not a square of the stated size.
    """
    path = folder / MARKERS_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
        size = float(document["size"])
        corners = {
            int(key): torch.tensor(value, dtype=torch.float64) for key, value in document.get("tags", {}).items()
        }
        layout = MarkerLayout(str(document["dictionary"]), size, corners)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CaptureError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); needed: dictionary (for example DICT_4X4_50), "
            "size (edge in metres) and, if known, tags (id -> four corners [x, y, z] in the robot base frame)"
        ) from error
    count = len(aruco_dictionary(layout.dictionary).bytesList)
    if not 0 < size <= 1:
        raise CaptureError(f"{path}: size {size} m; allowed: above 0 up to 1, in metres (60 mm is 0.06)")
    for tag, square in corners.items():
        _check_square(path, layout, tag, square, count)
    return layout


def _check_square(path: Path, layout: MarkerLayout, tag: int, square: Tensor, count: int) -> None:
    if not 0 <= tag < count:
        raise CaptureError(f"{path}: tag {tag}; {layout.dictionary} has ids 0 to {count - 1}")
    if square.shape != (4, 3):
        raise CaptureError(
            f"{path}: tag {tag} has corners of shape {tuple(square.shape)}; needed: four points [x, y, z]"
        )
    edges = (square.roll(-1, 0) - square).norm(dim=-1)
    diagonals = (square[:2] - square[2:]).norm(dim=-1)
    off = torch.cat([edges / layout.size, diagonals / (layout.size * 2**0.5)]) - 1
    if not bool((off.abs() <= _EDGE_TOLERANCE).all()):
        raise CaptureError(
            f"{path}: the corners of tag {tag} are not a square of {layout.size} m (edges {edges.tolist()}); give them "
            "in metres, in the order top left, top right, bottom right, bottom left"
        )


def locate_tags(capture: Capture, dictionary: str) -> dict[int, TagInScan]:
    """Find all tags that at least two photos see from directions 3 degrees apart, in the scan frame."""
    sightings: dict[int, list[tuple[Camera, np.ndarray]]] = {}
    for index in range(len(capture.images)):
        view = load_view(capture, index)
        for tag, corners in find_tags(view.rgb.numpy(), dictionary).items():
            sightings.setdefault(tag, []).append((view.camera, corners))
    located = {tag: _locate(seen) for tag, seen in sorted(sightings.items())}
    return {tag: found for tag, found in located.items() if found is not None}


def _locate(seen: list[tuple[Camera, np.ndarray]]) -> TagInScan | None:
    """Triangulate the four corners, dropping the photo that fits worst until all agree."""
    while len(seen) >= 2:
        poses = np.concatenate([camera.world_to_camera.double().numpy() for camera, _ in seen])
        K = np.concatenate([camera.K.double().numpy() for camera, _ in seen])
        pixels = np.stack([corners for _, corners in seen])
        solved = [triangulate(pixels[:, corner], poses, K) for corner in range(4)]
        corners = np.stack([point for point, _ in solved])
        squared = np.stack([(error**2).sum(-1) for _, error in solved]).mean(0)
        if squared.max() > _OUTLIER_PX**2:
            worst = int(squared.argmax())
            seen = seen[:worst] + seen[worst + 1 :]
            continue
        depths = (poses[:, 2, :3] @ corners.mean(0)) + poses[:, 2, 3]
        if (depths <= 0).any() or widest_angle(corners.mean(0), poses) < _MINIMUM_ANGLE_RAD:
            return None
        return TagInScan(corners, float(np.sqrt(squared.mean())), len(seen))
    return None


def align_capture(capture: Capture, layout: MarkerLayout | None, marker_size: float | None) -> Capture:
    """Add ``base_from_scan`` and ``residuals["scale"]`` as far as the tags tell them.

    ``scale`` holds metres_per_unit, residual_mm, tags (number used), frame and note. Frame ``robot_base``: known
    corners fix it. ``table``: only the edge length is known; z is up from the tags' plane, x and the origin are
    arbitrary. ``scan``: no tags; size and direction are unknown and ``base_from_scan`` is None.

    Args:
        capture: with pinhole cameras.
        layout: what ``markers.json`` says, if there is one.
        marker_size: edge (m) given by the user; needed without a layout, checked against it otherwise.

    Raises:
        CaptureError: size and layout contradict each other, or the tags found do not lie as the layout says.
    """
    if layout is not None and marker_size is not None and abs(marker_size / layout.size - 1) > _EDGE_TOLERANCE:
        raise CaptureError(
            f"marker size {marker_size} m contradicts {MARKERS_FILE} ({layout.size} m); measure the edge of the black "
            "square and correct one of them"
        )
    if layout is None and marker_size is None:
        note = f"no {MARKERS_FILE} and no marker size: scale unknown"
        return _with_scale(capture, None, _scale_record(None, None, 0, "scan", note))
    located = locate_tags(capture, layout.dictionary if layout else _guess_dictionary(capture))
    if layout is not None and any(tag in layout.corners for tag in located):
        return _aligned_to_base(capture, layout, located)
    if located:
        return _aligned_to_table(capture, layout.size if layout else float(marker_size or 0), located)
    note = "no tag was found in two or more photos: scale unknown; put tags in view and photograph again"
    return _with_scale(capture, None, _scale_record(None, None, 0, "scan", note))


def _guess_dictionary(capture: Capture) -> str:
    """The common dictionary that finds most tags in a sample of the photos."""
    every = -(-len(capture.images) // _GUESS_PHOTOS)
    sample = [load_view(capture, index).rgb.numpy() for index in range(0, len(capture.images), every)]
    return max(_COMMON_DICTIONARIES, key=lambda name: sum(len(find_tags(rgb, name)) for rgb in sample))


def _aligned_to_base(capture: Capture, layout: MarkerLayout, located: Mapping[int, TagInScan]) -> Capture:
    tags = [tag for tag in located if tag in layout.corners]
    source = torch.from_numpy(np.concatenate([located[tag].corners for tag in tags]))
    target = torch.cat([layout.corners[tag] for tag in tags])
    try:
        estimate = robust_similarity(source, target, _MISPLACED_M)
    except CaptureError:
        estimate = None
    if estimate is None or 2 * int(estimate.inliers.sum()) <= len(source):
        raise CaptureError(
            f"tags {tags} were found, but not where {MARKERS_FILE} says (more than half are over "
            f"{_MISPLACED_M * 1000:.0f} mm off); measure their corners in the robot base frame again"
        )
    residual = _residual_mm(estimate, source, target)
    misplaced = [tag for row, tag in enumerate(tags) if not bool(estimate.inliers[4 * row : 4 * row + 4].all())]
    note = f"left out, not where {MARKERS_FILE} says: tags {misplaced}" if misplaced else ""
    record = _scale_record(estimate.scale, residual, len(tags) - len(misplaced), "robot_base", note)
    record["reprojection_px"] = float(np.mean([located[tag].reprojection_px for tag in tags]))
    return _with_scale(capture, estimate.matrix, record)


def _residual_mm(estimate: Similarity, source: Tensor, target: Tensor) -> float:
    """RMS distance of the inlier corners after alignment."""
    distances = (estimate.apply(source) - target).norm(dim=-1)[estimate.inliers]
    return float(1000 * distances.square().mean().sqrt())


def _aligned_to_table(capture: Capture, size: float, located: Mapping[int, TagInScan]) -> Capture:
    edges = np.concatenate([tag.edges for tag in located.values()])
    scale = size / float(np.median(edges))
    residual = float(1000 * np.sqrt(np.mean((edges * scale - size) ** 2)))
    corners = torch.from_numpy(_largest_plane([tag.corners for tag in located.values()], size / scale))
    centers = torch.cat([camera.centers for camera in capture.cameras]).double()
    table_from_scan = plane_frame(corners, centers.mean(0))
    table_from_scan[:3] *= scale
    note = "the robot base is unknown: z is up from the plane of the tags, x and the origin are arbitrary"
    record = _scale_record(scale, residual, len(located), "table", note)
    return _with_scale(capture, table_from_scan, record)


def _largest_plane(tags: list[np.ndarray], edge: float) -> np.ndarray:
    """Corners [M, 3] of the tags that share the plane of most of them (up to a tenth of an edge apart)."""
    groups = []
    for square in tags:
        normal = np.linalg.svd(square - square.mean(0))[2][2]
        # A small tag's own normal is uncertain, so the allowance grows with distance (3 degrees).
        groups.append(
            [
                other
                for other in tags
                if np.abs((other - square.mean(0)) @ normal).max()
                <= 0.1 * edge + 0.05 * np.linalg.norm(other.mean(0) - square.mean(0))
            ]
        )
    return np.concatenate(max(groups, key=len))


def _scale_record(scale: float | None, residual_mm: float | None, tags: int, frame: str, note: str) -> dict[str, Any]:
    return {"metres_per_unit": scale, "residual_mm": residual_mm, "tags": tags, "frame": frame, "note": note}


def _with_scale(capture: Capture, base_from_scan: Tensor | None, record: dict[str, Any]) -> Capture:
    return replace(capture, base_from_scan=base_from_scan, residuals={**capture.residuals, "scale": record})
