"""Photograph the synthetic bench: gsrl_core/bundled/capture_tabletop, with its ground truth.

    uv run python scripts/make_capture.py [--out FOLDER] [--only N ...]

The same seed gives the same scene and the same views. Nothing here uses the project's own renderer, so the capture is
an independent test of the reconstruction.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tabletop import bench
from tabletop.raycast import Packed, pack, render, to_srgb

SEED = 20
FOCAL, CENTER_SHIFT, RADIAL = 560.0, (3.2, -2.4), -0.03
LONG, SHORT = 640, 480
SAMPLES = 4
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Shot:
    """One photo to take."""

    name: str
    camera_to_base: np.ndarray
    """[4, 4], OpenCV axes."""
    portrait: bool
    exposure: float


def main() -> None:
    """Render all photos (or the chosen ones) and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent.parent / "gsrl_core" / "bundled" / "capture_tabletop"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--only", type=int, nargs="*", help="indices of the photos to render; all without it")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    packed = pack(bench.solids(SEED))
    shots = plan_shots(np.random.default_rng(SEED + 1))
    for index, shot in enumerate(shots):
        if arguments.only is None or index in arguments.only:
            started = time.perf_counter()
            image = photograph(packed, shot, SEED + 100 + index)
            size = save(arguments.out / shot.name, image)
            print(f"{shot.name}  {size / 1e3:.0f} kB  {time.perf_counter() - started:.1f} s")
    write_truth(arguments.out, shots)


def plan_shots(rng: np.random.Generator) -> list[Shot]:
    """Thirty views: a low and a high ring around the table, and a cluster where the policy's camera will be."""
    poses = []
    for index in range(10):
        angle = 2 * math.pi * (index + rng.uniform(-0.2, 0.2)) / 10
        radius, height = rng.uniform(0.62, 0.72), rng.uniform(0.42, 0.58)
        eye = np.array([0.42 + radius * math.cos(angle), radius * math.sin(angle), height])
        poses.append((eye, np.array([0.45, 0.03, 0.0]) + rng.normal(0, 0.06, 3) * (1, 1, 0.3)))
    for index in range(11):
        angle = 2 * math.pi * (index + 0.5 + rng.uniform(-0.2, 0.2)) / 11
        radius, height = rng.uniform(0.98, 1.12), rng.uniform(0.62, 0.98)
        eye = np.array([0.40 + radius * math.cos(angle), radius * math.sin(angle), height])
        poses.append((eye, np.array([0.42, 0.0, 0.0]) + rng.normal(0, 0.08, 3) * (1, 1, 0.3)))
    policy_eye, policy_aim = np.array([0.075, -0.161, 0.497]), np.array([0.60, 0.095, 0.0])
    for index in range(9):
        spread = np.array([0.13, 0.15, 0.08]) * (1.6 if index % 3 == 2 else 1.0)
        eye = policy_eye + rng.uniform(-1, 1, 3) * spread
        poses.append((eye, policy_aim + rng.uniform(-1, 1, 3) * (0.14, 0.16, 0.02)))
    order = rng.permutation(len(poses))
    portrait = {3, 11, 19, 27}
    return [
        Shot(
            f"bench_{index:02d}.jpg",
            look_at(*poses[choice], roll=rng.normal(0, math.radians(3))),
            index in portrait,
            float(np.clip(rng.normal(1, 0.012), 0.97, 1.03)),
        )
        for index, choice in enumerate(order)
    ]


def look_at(eye: np.ndarray, aim: np.ndarray, roll: float) -> np.ndarray:
    """camera_to_base [4, 4] (OpenCV axes) at ``eye``, looking at ``aim``, turned by ``roll`` rad about the view."""
    forward = (aim - eye) / np.linalg.norm(aim - eye)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    pose = np.eye(4)
    pose[:3] = np.stack([c * right + s * down, -s * right + c * down, forward, eye], axis=1)
    return pose


def intrinsics(portrait: bool) -> tuple[np.ndarray, int, int]:
    """K [3, 3], width and height; a portrait photo is the same camera turned by a quarter."""
    width, height = (SHORT, LONG) if portrait else (LONG, SHORT)
    shift = CENTER_SHIFT[::-1] if portrait else CENTER_SHIFT
    K = np.array([[FOCAL, 0, width / 2 + shift[0]], [0, FOCAL, height / 2 + shift[1]], [0, 0, 1]])
    return K, width, height


def rays(shot: Shot) -> np.ndarray:
    """Unit directions [SAMPLES, SAMPLES, h, w, 3] in the base frame; first axis along rows."""
    K, width, height = intrinsics(shot.portrait)
    offset = (np.arange(SAMPLES) + 0.5) / SAMPLES
    rows = np.arange(height)[:, None] + offset[:, None, None, None]
    columns = np.arange(width)[None] + offset[None, :, None, None]
    x_lens, y_lens = np.broadcast_arrays((columns - K[0, 2]) / FOCAL, (rows - K[1, 2]) / FOCAL)
    x, y = x_lens, y_lens
    for _ in range(8):  # fixed point of x (1 + k r^2) = x_lens; converges by |k| r^2 < 0.02 each round
        stretch = 1 + RADIAL * (x * x + y * y)
        x, y = x_lens / stretch, y_lens / stretch
    directions = np.stack([x, y, np.ones_like(x)], axis=-1) @ shot.camera_to_base[:3, :3].T
    return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def photograph(packed: Packed, shot: Shot, seed: int) -> np.ndarray:
    """uint8 RGB [h, w, 3]: the rendered light through exposure, a slightly soft lens and sensor noise."""
    lights, ambient = bench.lights()
    center = shot.camera_to_base[:3, 3].copy()
    linear = render(packed.shape, packed.face, packed.texels, lights, ambient, center, rays(shot), SAMPLES, seed)
    linear = cv2.GaussianBlur(linear * shot.exposure, (0, 0), 0.45)
    rng = np.random.default_rng(seed)
    # Shot noise grows with the root of the signal; read noise does not.
    noisy = linear + rng.normal(size=linear.shape) * np.sqrt(2.5e-5 * np.maximum(linear, 0) + 1e-6)
    return np.round(255 * to_srgb(noisy)).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> int:
    """Write a JPEG and return its size in bytes."""
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    path.write_bytes(encoded)
    return len(encoded)


def write_truth(folder: Path, shots: list[Shot]) -> None:
    """markers.json (part of the capture) and ground_truth.json (for tests only)."""
    tags = {str(tag_id): corners for tag_id, corners in bench.tag_corners().items()}
    markers = {"dictionary": bench.TAG_DICTIONARY, "size": bench.TAG_EDGE, "tags": tags}
    (folder / "markers.json").write_text(json.dumps(markers, indent=1) + "\n")
    frames = []
    for shot in shots:
        K, width, height = intrinsics(shot.portrait)
        pose = np.round(shot.camera_to_base, 9).tolist()
        frames.append({"file": shot.name, "w": width, "h": height, "K": K.tolist(), "camera_to_base": pose})
    truth = {
        "convention": "OpenCV axes, metres, robot base frame; pixel centres at +0.5; x_lens = x (1 + k1 r^2)",
        "k1": RADIAL,
        "frames": frames,
    }
    (folder / "ground_truth.json").write_text(json.dumps(truth, indent=1) + "\n")


if __name__ == "__main__":
    main()
