"""What the command line draws: one progress line a stage, and errors as one clear line."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from torch import Tensor

PROGRESS_LOGGER = "gsrl.progress"
_PLAIN_INTERVAL_S = 15.0


class _Lines(logging.Handler):
    """Progress records as plain lines, for logs and pipes: the first, the last and one every few seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._told: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        stage, fraction = record.__dict__["stage"], record.__dict__["fraction"]
        now = time.monotonic()
        if fraction >= 1 or now - self._told.get(stage, float("-inf")) >= _PLAIN_INTERVAL_S:
            self._told[stage] = now
            self._console.print(f"{stage:>16} {fraction:4.0%}  {record.getMessage()}", highlight=False, markup=False)


class _Bars(logging.Handler):
    """Progress records as one bar a stage, on a terminal."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def emit(self, record: logging.LogRecord) -> None:
        stage, fraction = record.__dict__["stage"], record.__dict__["fraction"]
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=1.0, message="")
        self._progress.update(self._bars[stage], completed=fraction, message=record.getMessage())


@contextmanager
def progress_shown() -> Iterator[None]:
    """Draw progress records on standard error for the duration of the block."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    logger = logging.getLogger(PROGRESS_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    bars = Progress(
        TextColumn("{task.description:>16}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TextColumn("{task.fields[message]}", markup=False), console=console,
    )  # fmt: skip
    handler = _Bars(bars) if console.is_terminal else _Lines(console)
    logger.addHandler(handler)
    try:
        if console.is_terminal:
            with bars:
                yield
        else:
            yield
    finally:
        logger.removeHandler(handler)


class ConsoleReporter:
    """The :class:`gsrl_core.interfaces.Reporter` of commands that run a driver without a pipeline."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._log = logging.getLogger(PROGRESS_LOGGER)
        self._numbers = ""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Show the first few numbers beside the bar."""
        self._numbers = "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:3])

    def image(self, name: str, rgb: Tensor, step: int) -> None:
        """Pictures are not drawn in a terminal; drivers write theirs into the output folder."""

    def progress(self, fraction: float, message: str) -> None:
        """Move the bar."""
        text = f"{message}  {self._numbers}".rstrip()
        self._log.info("%s", text, extra={"stage": self._stage, "fraction": fraction})
