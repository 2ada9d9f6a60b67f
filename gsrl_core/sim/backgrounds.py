"""Pictures that stand behind the scene where it lets light through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsrl_core.errors import SimulationError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MOST = 512
"""Pictures of a folder: at 640 x 480 they fill 0.5 GB of the device."""


def load_backgrounds(folder: Path, height: int, width: int) -> Tensor:
    """All pictures of a folder in the order of their names, cropped about their middle: uint8 [N, height, width, 3].

    Raises:
        SimulationError: no such folder, no picture in it, more than :data:`MOST`, or one that cannot be read.
    """
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise SimulationError(f"sim.realism.background {str(folder)!r} is no folder; give one, or `random`")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not 0 < len(paths) <= MOST:
        raise SimulationError(
            f"sim.realism.background {str(folder)!r} holds {len(paths)} pictures ({', '.join(SUFFIXES)}); give 1 to "
            f"{MOST}"
        )
    pictures = np.empty((len(paths), height, width, 3), np.uint8)
    for out, path in zip(pictures, paths, strict=True):
        try:
            with Image.open(path) as image:
                out[:] = np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BOX))
        except (OSError, ValueError) as error:
            raise SimulationError(f"background picture {path} cannot be read: {error}") from error
    return torch.from_numpy(pictures)
