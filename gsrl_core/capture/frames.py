"""Where photos come from: a folder of pictures, or the sharp frames of a video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from gsrl_core.capture.dataset import resize_to_side
from gsrl_core.errors import CaptureError

if TYPE_CHECKING:
    import av

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")
MINIMUM_PHOTOS = 3
_SHARPNESS_SIDE = 640
_MINIMUM_BIN_S = 0.1

Progress = Callable[[float, str], None]


def silent(fraction: float, message: str) -> None:
    """A Progress that tells nobody."""


def collect_photos(source: Path, frames_folder: Path, max_frames: int, progress: Progress = silent) -> list[Path]:
    """The photos of a folder, or of a video the sharpest frames, which are written to ``frames_folder``.

    Raises:
        CaptureError: there is no such source, it is of another kind, or it gives fewer than three photos.
    """
    if source.is_dir():
        return list_photos(source)
    if not source.exists():
        raise CaptureError(f"{source}: there is no such folder or video; give a folder of photos or a video file")
    if source.suffix.lower() in VIDEO_SUFFIXES:
        return sharp_frames(source, frames_folder, max_frames, progress)
    if source.suffix.lower() in PHOTO_SUFFIXES:
        raise CaptureError(f"{source}: is a single photo; give the folder that holds all of them")
    raise CaptureError(
        f"{source}: is neither a folder nor a video; allowed: a folder of {', '.join(PHOTO_SUFFIXES)}, or a video "
        f"({', '.join(VIDEO_SUFFIXES)})"
    )


def list_photos(folder: Path) -> list[Path]:
    """The photos directly in ``folder``, sorted by name.

    Raises:
        CaptureError: the folder is missing, or holds fewer than three photos.
    """
    if not folder.is_dir():
        raise CaptureError(f"{folder}: there is no such folder; give a folder of photos")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    photos = [path for path in files if path.suffix.lower() in PHOTO_SUFFIXES]
    if len(photos) >= MINIMUM_PHOTOS:
        return photos
    others = sorted(
        {path.suffix.lower() for path in files if path.suffix.lower() in (".heic", ".dng", ".tif", ".webp")}
    )
    hint = f" (it holds {', '.join(others)} files: convert them to JPEG)" if others else ""
    found = f"{len(photos)} photo{'s' if len(photos) > 1 else ''}" if photos else "no photos"
    raise CaptureError(
        f"{folder}: {found}{hint}; at least {MINIMUM_PHOTOS} overlapping {'/'.join(PHOTO_SUFFIXES)} photos are needed, "
        "20 to 60 around the bench work well"
    )


def sharpness(rgb: np.ndarray) -> float:
    """Variance of the Laplacian of the grey image at one fixed size; higher is sharper (Pech-Pacheco et al. 2000)."""
    gray = cv2.cvtColor(resize_to_side(rgb, _SHARPNESS_SIDE), cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(gray, cv2.CV_64F).var())


def sharp_frames(video: Path, folder: Path, max_frames: int, progress: Progress = silent) -> list[Path]:
    """Write the sharpest frame of each of at most ``max_frames`` equal time bins to ``folder`` as JPEG.

    Bins are at least 0.1 s long: closer frames add work but no parallax.

    Raises:
        CaptureError: the file cannot be decoded, or gives fewer than three frames.
    """
    import av

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("frame_*.jpg"):
        old.unlink()
    written: list[Path] = []
    try:
        begin, end = _time_span(video)
        bin_length = max((end - begin) / max_frames * (1 + 1e-9), _MINIMUM_BIN_S)
        with av.open(str(video)) as container:
            for index, image in _sharpest_per_bin(_frames(container), begin, bin_length):
                written.append(folder / f"frame_{index:05d}.jpg")
                Image.fromarray(image).save(written[-1], quality=95)
                done = (index + 1) * bin_length / max(end - begin, bin_length)
                progress(min(1.0, done), f"{len(written)} frames taken")
    except (av.error.FFmpegError, IndexError) as error:
        raise CaptureError(
            f"{video}: cannot be decoded as a video ({error}); record it again or convert it to H.264 MP4"
        ) from error
    if len(written) < MINIMUM_PHOTOS:
        raise CaptureError(
            f"{video}: gave {len(written)} frames; at least {MINIMUM_PHOTOS} are needed, film for 20 s or longer"
        )
    return written


def _time_span(video: Path) -> tuple[float, float]:
    """Begin and end of the pictures in seconds, from packet times, because containers often do not state them.

    A clip cut out of a longer film may begin late.
    """
    import av

    begin, end = math.inf, 0.0
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.pts is not None:
                begin = min(begin, float(packet.pts * stream.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * stream.time_base))
    return min(begin, end), end


def _frames(container: av.container.InputContainer) -> Iterator[tuple[float, np.ndarray]]:
    """Time [s] and upright uint8 RGB [h, w, 3] of every decoded frame."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    for frame in container.decode(stream):
        if frame.time is not None:
            # FFmpeg reports the display rotation counter-clockwise, as np.rot90 turns.
            yield frame.time, np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _sharpest_per_bin(
    frames: Iterator[tuple[float, np.ndarray]], begin: float, bin_length: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Bin number and image of the sharpest frame of each time bin, in order of time."""
    current, best, best_image = -1, -1.0, None
    for time, image in frames:
        index = int((time - begin) / bin_length)
        if index != current:
            if best_image is not None:
                yield current, np.ascontiguousarray(best_image)
            current, best = index, -1.0
        score = sharpness(image)
        if score > best:
            best, best_image = score, image
    if best_image is not None:
        yield current, np.ascontiguousarray(best_image)
