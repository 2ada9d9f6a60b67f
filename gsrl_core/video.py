"""Episodes as mp4 files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

MIN_WIDTH = 480


def write_video(path: Path, frames: Tensor, fps: float, *, label: str) -> None:
    """H.264 of uint8 [T, h, w, 3], small pictures enlarged to about 480 px, with a caption bar above them."""
    import imageio.v3 as iio
    from PIL import Image, ImageDraw

    height, width = frames.shape[1:3]
    factor = max(1, round(MIN_WIDTH / width))
    # H.264 with 4:2:0 colour wants even sizes.
    size = (width * factor // 2 * 2, height * factor // 2 * 2)
    bar = 20
    pages = []
    for number, frame in enumerate(frames.numpy()):
        page = Image.new("RGB", (size[0], size[1] + bar), "black")
        page.paste(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR), (0, bar))
        ImageDraw.Draw(page).text((6, 4), f"{label}  {number / fps:.1f} s", fill="white")
        pages.append(np.asarray(page))
    iio.imwrite(path, np.stack(pages), plugin="pyav", codec="libx264", fps=round(fps))
