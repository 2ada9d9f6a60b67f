"""3D Gaussian optimisation over posed photos."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from scipy.spatial import KDTree
from torch import Tensor

from gsrl_core.capture.dataset import View
from gsrl_core.errors import SceneError
from gsrl_core.splat.densify import Growth, Trainable, budget_at
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.quality import photometric_loss, psnr
from gsrl_core.splat.shape import needle_penalty
from gsrl_core.states import load_state, save_state

METRICS_EVERY = 50
FINAL_MEANS_RATE = 0.01
"""The means' learning rate decays exponentially to this fraction."""
FULL_STEPS = 30_000
"""The published learning rate of the means is for a fit of so many steps; see ``means_rate_factor``."""
NEEDLE_WEIGHT, NEEDLE_FROM = 0.01, 0.1
"""Weight of the penalty on needles (that of the paper), and the fraction of the steps from which it acts."""
_CHECKPOINT = "fit.pt"
logger = logging.getLogger(__name__)

RasterizeFunction = Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]


class FitReporter(Protocol):
    """What the fit tells about itself (``interfaces.Reporter``, which lies a layer above)."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers at ``step``."""
        ...

    def progress(self, fraction: float, message: str) -> None:
        """``fraction`` in [0, 1] of the work, with a short text."""
        ...


@dataclass(frozen=True)
class FitSettings:
    """How to fit; see ``sections.FitConfig`` for the meaning of each value."""

    steps: int
    max_gaussians: int
    sh_degree: int
    ssim_weight: float
    densify_every: int
    densify_until: float
    checkpoint_every: int
    seed: int


@dataclass(frozen=True)
class FitResult:
    """The fitted Gaussians, in the frame of the cameras."""

    gaussians: Gaussians
    seconds: float
    """Time spent in steps, all attempts together."""


def initial_gaussians(points: Tensor, colors: Tensor, sh_degree: int) -> Gaussians:
    """One Gaussian per sparse point: as large as the mean distance to its three nearest neighbours, opacity 0.1.

    Args:
        points: [P, 3].
        colors: uint8 [P, 3].
        sh_degree: degree of the harmonics (zero above the constant).

    Raises:
        SceneError: fewer than four points, or all in one place.
    """
    if len(points) < 4:
        raise SceneError(f"fit: {len(points)} sparse points; at least 4 are needed to start from")
    distances, _ = KDTree(points.numpy()).query(points.numpy(), k=4)
    spacing = torch.from_numpy(distances[:, 1:]).float().square().mean(-1).sqrt()
    if not bool((spacing > 0).any()):
        raise SceneError(f"fit: all {len(points)} sparse points coincide; the cameras were not estimated well")
    spacing = spacing.clamp_min(1e-2 * float(spacing[spacing > 0].median()))  # duplicates
    count = len(points)
    return Gaussians(
        means=points.float(),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(count, 1),
        log_scales=spacing.log()[:, None].repeat(1, 3),
        logit_opacities=torch.full((count,), math.log(0.1 / 0.9)),
        harmonics=colors_to_harmonics(colors.float() / 255),
    ).with_sh_degree(sh_degree)


def fit(
    views: Sequence[View],
    points: Tensor,
    colors: Tensor,
    settings: FitSettings,
    rasterize: RasterizeFunction,
    workspace: Path,
    reporter: FitReporter,
    device: torch.device | str = "cpu",
) -> FitResult:
    """Optimise Gaussians so that they look like the photos.

    The same input gives the same result (on the CPU bit for bit), also when the process was killed and called again
    with the same ``workspace``. A checkpoint there of other photos, cameras, points or settings is not continued.

    Args:
        views: photos to fit with their cameras.
        points: [P, 3] sparse points, in the cameras' frame.
        colors: uint8 [P, 3].
        settings: steps, sizes and weights.
        rasterize: ``raster_numba.rasterize`` or ``fit_gsplat.rasterize_gsplat``.
        workspace: folder for the checkpoint.
        reporter: hears progress and metrics.
        device: of the rasteriser.

    Raises:
        SceneError: no photos, too few points, or a loss that is not finite.
    """
    if not views:
        raise SceneError("fit: no photos to fit; lower capture.held_out_every or give more photos")
    loop = _Loop(views, points, colors, settings, rasterize, workspace, device)
    return loop.run(reporter)


class _Loop:
    def __init__(
        self,
        views: Sequence[View],
        points: Tensor,
        colors: Tensor,
        settings: FitSettings,
        rasterize: RasterizeFunction,
        workspace: Path,
        device: torch.device | str,
    ) -> None:
        self.settings, self.rasterize, self.device = settings, rasterize, torch.device(device)
        self.checkpoint = workspace / _CHECKPOINT
        self.photos = [view.rgb.to(self.device, torch.float32) / 255 for view in views]
        self.cameras = [view.camera.to(self.device) for view in views]
        self.extent = scene_extent(torch.cat([view.camera.centers for view in views]))
        self.fingerprint = _fingerprint(views, points, colors, settings, self.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step, self.seconds = 0, 0.0
        self.queue: list[int] = []
        self.initial = min(len(points), settings.max_gaussians)
        if not self._resume():
            chosen = torch.randperm(len(points), generator=self.generator)[: self.initial].sort().values
            start = initial_gaussians(points[chosen], colors[chosen], settings.sh_degree)
            self.model = Trainable(start.to(self.device), self.extent)
            self.growth = Growth(len(self.model), self.device)

    def run(self, reporter: FitReporter) -> FitResult:
        begin = time.monotonic()
        before = self.seconds
        while self.step < self.settings.steps:
            loss, picture, photo = self._optimize()
            self.step += 1
            if not math.isfinite(loss):
                raise SceneError(
                    f"fit: the loss is {loss} at step {self.step}; the cameras or sparse points hold non-finite values "
                    "(look at transforms.json) or the optimisation diverged (try another fit.seed)"
                )
            self._densify()
            self.seconds = before + time.monotonic() - begin
            if self.step % METRICS_EVERY == 0 or self.step == self.settings.steps:
                self._report(reporter, loss, psnr(picture.detach().clamp(0, 1), photo))
            if self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps:
                self._save()
        return FitResult(self.model.gaussians().to("cpu"), self.seconds)

    def _optimize(self) -> tuple[float, Tensor, Tensor]:
        index = self._next_view()
        model, camera, photo = self.model, self.cameras[index], self.photos[index]
        done = self.step / self.settings.steps
        model.set_rate("means", means_rate_factor(self.settings.steps) * FINAL_MEANS_RATE**done)
        background = torch.rand(3, generator=self.generator).to(self.device)
        picture, _, _, info = self.rasterize(
            model["means"], model["quats"], model["log_scales"], model["logit_opacities"],
            model.harmonics(self._degree()), camera.world_to_camera[0], camera.K[0], camera.width, camera.height,
            background,
        )  # fmt: skip
        loss = photometric_loss(picture, photo, self.settings.ssim_weight)
        if done >= NEEDLE_FROM:
            loss = loss + NEEDLE_WEIGHT * needle_penalty(model["log_scales"])
        loss.backward()
        gradient: Any = info["means2d"]
        self.growth.observe(gradient.absgrad.reshape(-1, 2), info["radii"], max(camera.width, camera.height))
        model.step()
        return float(loss.detach()), picture, photo

    def _degree(self) -> int:
        """Rises from 0 to the full degree in the first half."""
        stage = 2 * self.step * (self.settings.sh_degree + 1) // self.settings.steps
        return min(stage, self.settings.sh_degree)

    def _densify(self) -> None:
        settings = self.settings
        stop = round(settings.densify_until * settings.steps)
        if self.step % settings.densify_every == 0 and self.step <= stop:
            budget = budget_at(self.step, 0, stop, self.initial, settings.max_gaussians)
            self.growth.apply(self.model, budget, self.generator)

    def _next_view(self) -> int:
        if not self.queue:
            self.queue = torch.randperm(len(self.photos), generator=self.generator).tolist()
        return self.queue.pop()

    def _report(self, reporter: FitReporter, loss: float, decibel: float) -> None:
        count, steps = len(self.model), self.settings.steps
        rate = self.step / max(self.seconds, 1e-9)
        values = {"fit/loss": loss, "fit/psnr": decibel, "fit/gaussians": float(count), "fit/steps_per_second": rate}
        reporter.metrics(values, self.step)
        reporter.progress(self.step / steps, f"step {self.step}/{steps}, {count} Gaussians, {decibel:.1f} dB")

    def _save(self) -> None:
        state = {
            "fingerprint": self.fingerprint, "step": self.step, "seconds": self.seconds, "queue": self.queue,
            "generator": self.generator.get_state(), "initial": self.initial, "model": self.model.state(),
            "growth": {"score": self.growth.score, "seen": self.growth.seen},
        }  # fmt: skip
        save_state(self.checkpoint, state)

    def _resume(self) -> bool:
        state = load_state(self.checkpoint, ("fingerprint", "step", "model", "growth"), self.device)
        if state is None:
            return False
        if state["fingerprint"] != self.fingerprint:
            logger.info("%s is of another fit; this one starts anew", self.checkpoint)
            return False
        self.step, self.seconds, self.queue = state["step"], state["seconds"], state["queue"]
        self.generator.set_state(state["generator"].cpu())
        self.initial = state["initial"]
        self.model = Trainable.restored(state["model"], self.extent)
        self.growth = Growth(len(self.model), self.device)
        self.growth.score, self.growth.seen = state["growth"]["score"], state["growth"]["seen"]
        return True


def means_rate_factor(steps: int) -> float:
    """How much faster the means move in a fit shorter than ``FULL_STEPS``.

    The distance that noisy steps cover grows with the root of their number, so sqrt(FULL_STEPS / steps) lets Gaussians
    travel as far in fewer steps. Measured on 23 phone photos with 1,500 steps: SSIM 0.631 -> 0.644.
    """
    return max(1.0, math.sqrt(FULL_STEPS / steps))


def _fingerprint(
    views: Sequence[View], points: Tensor, colors: Tensor, settings: FitSettings, device: torch.device
) -> str:
    """Digest of all that decides the result; a checkpoint with another one is not continued."""
    digest = hashlib.sha256(repr((settings, device.type)).encode())
    for tensor in (
        points,
        colors,
        *(t for view in views for t in (view.rgb, view.camera.world_to_camera, view.camera.K)),
    ):
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def scene_extent(centers: Tensor) -> float:
    """Radius of the camera centres [C, 3] about their mean plus 10 %, as 3D Gaussian Splatting measures a scene."""
    radius = float((centers - centers.mean(0)).norm(dim=-1).max())
    return 1.1 * radius if radius > 0 else 1.0
