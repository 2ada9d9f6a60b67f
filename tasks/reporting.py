"""Where a running stage reports to: MLflow, TensorBoard, the Prefect UI, and the log that the command line draws."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.context import TaskRunContext

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from tasks.tracking import StageRun

PROGRESS_LOGGER = "gsrl.progress"
"""Logger of progress records; each carries ``stage`` and ``fraction`` (0 to 1) beside its message."""

_log = logging.getLogger(PROGRESS_LOGGER)
_INTERVAL_S = 3.0
_MAX_IMAGE_WIDTH = 1200


class StageReporter:
    """The :class:`gsrl_core.interfaces.Reporter` of one stage inside a Prefect task."""

    def __init__(self, stage: str, run: StageRun, tensorboard: Path | None) -> None:
        self._stage = stage
        self._run = run
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._bar: UUID | None = None
        self._told = float("-inf")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers to MLflow and TensorBoard."""
        self._run.metrics(values, step)
        if writer := self._tensorboard_writer():
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def image(self, name: str, rgb: Tensor, step: int) -> None:
        """A picture, uint8 [h, w, 3], to MLflow and TensorBoard."""
        pixels = rgb.detach().cpu().numpy()
        self._run.image(name, pixels, step)
        if writer := self._tensorboard_writer():
            writer.add_image(name, pixels, step, dataformats="HWC")

    def progress(self, fraction: float, message: str) -> None:
        """To the log at once, to the Prefect UI every few seconds."""
        _log.info(message, extra={"stage": self._stage, "fraction": fraction})
        now = time.monotonic()
        if TaskRunContext.get() is None or (fraction < 1 and now - self._told < _INTERVAL_S):
            return
        self._told = now
        percent = 100 * min(max(fraction, 0.0), 1.0)
        if self._bar is None:
            self._bar = create_progress_artifact(percent, key=f"{self._stage}-progress", description=message)
        else:
            update_progress_artifact(self._bar, progress=percent, description=message)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()

    def _tensorboard_writer(self) -> SummaryWriter | None:
        if self._writer is None and self._tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tensorboard))
        return self._writer


def show_picture(key: str, path: Path, description: str) -> None:
    """Show a picture in the Prefect UI; embedded, because the server cannot read this machine's files."""
    from PIL import Image

    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((_MAX_IMAGE_WIDTH, _MAX_IMAGE_WIDTH))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    create_image_artifact(url, key=key, description=description)
