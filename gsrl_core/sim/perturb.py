"""Disturbances of the evaluation sweep: what may differ between bench and simulation, drawn per episode seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.sections import RealismConfig
from gsrl_core.sim.task import EpisodeSpec

# Distinguishes this stream from that of the start state (task.py), so that a perturbation never moves the objects.
_PERTURBATION_STREAM = 1


@dataclass(frozen=True)
class Episode:
    """One episode with its disturbance drawn."""

    spec: EpisodeSpec
    gain: Tensor
    """float32 [3]: factors of the picture's R, G and B."""
    camera_turn: np.ndarray
    """float64 [3]: rotation vector (rad) in the camera's own axes; with ``camera_shift`` the motion applied after
    world_to_camera, of every camera."""
    camera_shift: np.ndarray
    """float64 [3]: translation (m)."""
    instruction: str | None
    """Replaces the task's wording; none keeps it."""


@dataclass(frozen=True)
class Perturbation:
    """Ranges that episodes draw from; the defaults change nothing."""

    kind: str = "nominal"
    """Name of the sweep's cell."""
    pose_range_scale: float = 1.0
    """Multiplies the half ranges of the object positions."""
    gain_range: tuple[float, float] = (1.0, 1.0)
    """Brightness factor, uniform."""
    white_balance: float = 0.0
    """Red and blue change by factors uniform in 1 +- this, independently."""
    camera_shift: float = 0.0
    """Standard deviation of the camera's position per axis (m)."""
    camera_turn: float = 0.0
    """Standard deviation of the camera's rotation vector per axis (rad)."""
    friction_range: tuple[float, float] = (1.0, 1.0)
    """Factor of the friction of objects and fingers, log-uniform."""
    reworded: bool = False
    """One of the task's other wordings is chosen."""
    instructions: tuple[str, ...] = ()
    """Wordings to choose from; empty keeps the task's own."""
    realism: RealismConfig | None = None
    """The values that were given to it replace those of ``sim.realism``; the others stay."""

    def realism_over(self, configured: RealismConfig) -> RealismConfig:
        """``configured`` (``sim.realism``) with this perturbation's values over it."""
        changes = {} if self.realism is None else {n: getattr(self.realism, n) for n in self.realism.model_fields_set}
        return configured.model_copy(update=changes)

    def for_task(self, rewordings: tuple[str, ...]) -> Perturbation:
        """With the wordings that the task at hand offers, if this perturbation rewords."""
        return replace(self, instructions=rewordings) if self.reworded else self

    def draw(self, seed: int) -> Episode:
        """The episode of ``seed``: always the same for the same seed and ranges."""
        rng = np.random.Generator(np.random.PCG64([_PERTURBATION_STREAM, seed]))
        # Every quantity is drawn whether used or not, so that one range does not shift the draws of the others.
        brightness = rng.uniform(*self.gain_range)
        red, blue = 1 + self.white_balance * rng.uniform(-1, 1, 2)
        shift = self.camera_shift * rng.standard_normal(3)
        turn = self.camera_turn * rng.standard_normal(3)
        friction = float(np.exp(rng.uniform(*np.log(self.friction_range))))
        choice = rng.integers(max(1, len(self.instructions)))
        return Episode(
            spec=EpisodeSpec(seed, self.pose_range_scale, friction),
            gain=torch.tensor([red, 1.0, blue], dtype=torch.float32) * brightness,
            camera_turn=turn,
            camera_shift=shift,
            instruction=self.instructions[choice] if self.instructions else None,
        )


PERTURBATIONS = {
    perturbation.kind: perturbation
    for perturbation in (
        Perturbation(),
        Perturbation("pose", pose_range_scale=1.5),
        Perturbation("lighting", gain_range=(0.6, 1.3), white_balance=0.15),
        Perturbation("camera", camera_shift=0.01, camera_turn=0.015),
        Perturbation("friction", friction_range=(0.4, 1.5)),
        Perturbation("wording", reworded=True),
        Perturbation(
            "sensor",
            realism=RealismConfig(gamma_range=(0.8, 1.25), contrast_range=(0.8, 1.2), read_noise=3.0, shot_noise=6.0),
        ),
        Perturbation("background", realism=RealismConfig(background="random")),
        Perturbation("shadow", realism=RealismConfig(shadow=0.5)),
    )
}
"""The sweep's cells by name (``evaluation.perturbations``)."""


def perturbation(kind: str) -> Perturbation:
    """The perturbation of this name. Raises SimulationError for an unknown one."""
    if kind not in PERTURBATIONS:
        raise SimulationError(f"perturbation {kind!r}; allowed: {', '.join(PERTURBATIONS)}")
    return PERTURBATIONS[kind]
