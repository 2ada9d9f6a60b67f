"""3D Gaussian optimisation (Kerbl et al. 2023) over posed photos, on any differentiable rasteriser."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.spatial import KDTree
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera
from gsrl_core.splat import densify
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.quality import photometric_loss

Rasterize = Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]
"""``raster_numba.rasterize`` or ``fit_gsplat.rasterize``."""
Progress = Callable[[int, Mapping[str, float]], None]
"""Told the step and its numbers."""

SH_C0 = 0.28209479177387814
_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-15
_COARSE_UNTIL, _COARSE = 0.3, 0.5
"""For this fraction of the steps the photos are used at half size: the rough shape costs a quarter there."""
_SCENE_MARGIN = 1.1


@dataclass(frozen=True)
class FitSettings:
    """What the optimisation is told, in its own terms."""

    steps: int
    max_gaussians: int
    sh_degree: int
    ssim_weight: float
    densify_every: int
    densify_until: float
    """Fraction of the steps."""
    seed: int
    means_rate: float = 1.6e-4
    """Learning rate of the means at the start, in scene extents; falls to a hundredth."""
    scales_rate: float = 5e-3
    opacities_rate: float = 5e-2
    quats_rate: float = 1e-3
    color_rate: float = 2.5e-3
    """Of the constant band; the others learn 20 times slower."""
    save_every_s: float = 15.0


@dataclass(frozen=True)
class TrainingView:
    """A photo and its camera."""

    photo: Tensor
    """float32 [h, w, 3] in [0, 1]."""
    camera: Camera
    """Leading size 1."""

    def resized(self, factor: float) -> TrainingView:
        """The same view in fewer pixels (area mean)."""
        size = (max(1, round(self.photo.shape[0] * factor)), max(1, round(self.photo.shape[1] * factor)))
        photo = torch.nn.functional.interpolate(self.photo.permute(2, 0, 1)[None], size=size, mode="area")[0]
        return TrainingView(photo.permute(1, 2, 0).contiguous(), self.camera.resized(size[1], size[0]))


def fit(
    views: Sequence[TrainingView],
    points: Tensor,
    colors: Tensor,
    settings: FitSettings,
    rasterize: Rasterize,
    *,
    workspace: Path | None = None,
    progress: Progress = lambda _step, _numbers: None,
    device: torch.device | str = "cpu",
) -> Gaussians:
    """Optimise Gaussians so that they look like the photos.

    Args:
        views: what to look like, at least one.
        points: float32 [P, 3] where to start, in the cameras' world frame.
        colors: uint8 [P, 3].
        settings: steps, budget, rates.
        rasterize: the differentiable renderer.
        workspace: where the state is kept every ``save_every_s`` seconds; a later call with the same inputs continues
            from it with the same numbers.
        progress: told about every step.
        device: where the Gaussians live.

    Raises:
        SceneError: no views, fewer than four points, or the loss became non-finite.
    """
    if not views:
        raise SceneError("no photos to fit; at least one must not be held out")
    if len(points) < 4:
        raise SceneError(f"{len(points)} sparse points to start from; at least 4 are needed, so take more photos")
    fitter = _Fitter(views, points, colors, settings, rasterize, torch.device(device))
    path = workspace / "fit.pt" if workspace else None
    if path:
        fitter.resume(path)
    saved = time.monotonic()
    while fitter.step < settings.steps:
        progress(fitter.step + 1, fitter.advance())
        if path and time.monotonic() - saved > settings.save_every_s:
            fitter.save(path)
            saved = time.monotonic()
    return fitter.gaussians()


def scene_extent(camera_centers: Tensor) -> float:
    """Radius of the cameras around their mean [C, 3], with a margin: the unit of lengths in the optimisation."""
    return float((camera_centers - camera_centers.mean(0)).norm(dim=-1).max()) * _SCENE_MARGIN or 1.0


def initial_parameters(points: Tensor, colors: Tensor, sh_degree: int, extent: float) -> dict[str, Tensor]:
    """One round Gaussian a point, as wide as the distance to its neighbours (root mean square of three)."""
    distances, _ = KDTree(points.numpy()).query(points.numpy(), k=4)
    spacing = torch.from_numpy((distances[:, 1:] ** 2).mean(-1)).sqrt().float()
    spacing = spacing.clamp(1e-5 * extent, 0.1 * extent)
    harmonics = torch.zeros(len(points), (sh_degree + 1) ** 2, 3)
    harmonics[:, 0] = (colors.float() / 255 - 0.5) / SH_C0
    quats = torch.zeros(len(points), 4)
    quats[:, 0] = 1
    return {
        "means": points.float().clone(),
        "quats": quats,
        "log_scales": spacing.log()[:, None].repeat(1, 3),
        "logit_opacities": torch.full((len(points),), math.log(0.1 / 0.9)),
        "constant": harmonics[:, :1].contiguous(),
        "bands": harmonics[:, 1:].contiguous(),
    }


class _Fitter:
    """State and one step of the optimisation. ``constant`` and ``bands`` are the harmonics, which learn apart."""

    def __init__(
        self,
        views: Sequence[TrainingView],
        points: Tensor,
        colors: Tensor,
        settings: FitSettings,
        rasterize: Rasterize,
        device: torch.device,
    ) -> None:
        self.settings, self.rasterize, self.device = settings, rasterize, device
        self.levels = [_prepared(views, _COARSE, device), _prepared(views, 1.0, device)]
        self.extent = scene_extent(torch.cat([view.camera.centers() for view in views]))
        first = initial_parameters(points, colors, settings.sh_degree, self.extent)
        if len(points) > settings.max_gaussians:
            picked = torch.randperm(len(points), generator=torch.Generator().manual_seed(settings.seed))
            first = {name: value[picked[: settings.max_gaussians]] for name, value in first.items()}
        self.parameters = {name: value.to(device) for name, value in first.items()}
        self.moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in self.parameters.items()}
        self.start_count = len(self.parameters["means"])
        self.growth = densify.Growth.empty(self.start_count, device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.order: list[int] = []
        self.step = 0

    def gaussians(self) -> Gaussians:
        """The current state."""
        p = self.parameters
        quats = torch.nn.functional.normalize(p["quats"], dim=-1)
        harmonics = torch.cat([p["constant"], p["bands"]], 1)
        return Gaussians(
            *(t.detach().cpu() for t in (p["means"], quats, p["log_scales"], p["logit_opacities"], harmonics))
        )

    def advance(self) -> dict[str, float]:
        """One step on one photo. Returns its numbers; raises SceneError for a non-finite loss."""
        settings, level = self.settings, self.levels[self.step >= _COARSE_UNTIL * self.settings.steps]
        if not self.order:
            self.order = torch.randperm(len(level), generator=self.generator).tolist()
        photo, camera = level[self.order.pop()]
        leaves = {name: value.requires_grad_(True) for name, value in self.parameters.items()}
        background = torch.rand(3, generator=self.generator).to(self.device)
        bands = self._active_bands()
        rgb, _, _, info = self.rasterize(
            leaves["means"],
            leaves["quats"],
            leaves["log_scales"],
            leaves["logit_opacities"],
            torch.cat([leaves["constant"], leaves["bands"][:, :bands]], 1),
            camera.world_to_camera[0],
            camera.K[0],
            camera.width,
            camera.height,
            background,
        )
        loss = photometric_loss(rgb, photo, settings.ssim_weight)
        value = float(loss)
        if not math.isfinite(value):
            raise SceneError(f"the loss of the fit is {value} at step {self.step}; the cameras or photos are unusable")
        loss.backward()
        self.growth.add(info["means2d"].absgrad, info["radii"])  # type: ignore[attr-defined]
        self._update(leaves)
        self.step += 1
        last = settings.densify_until * settings.steps
        if self.step % settings.densify_every == 0 and self.step <= last:
            self._densify(int(last))
        return {"fit/loss": value, "fit/gaussians": float(len(self.parameters["means"]))}

    def _active_bands(self) -> int:
        """Harmonics beyond the constant one, a degree more after each fifth of the steps."""
        degree = min(self.settings.sh_degree, 5 * self.step // max(1, self.settings.steps))
        return (degree + 1) ** 2 - 1

    def _rates(self) -> dict[str, float]:
        s = self.settings
        means = s.means_rate * self.extent * 0.01 ** (self.step / s.steps)
        return {
            "means": means,
            "quats": s.quats_rate,
            "log_scales": s.scales_rate,
            "logit_opacities": s.opacities_rate,
            "constant": s.color_rate,
            "bands": s.color_rate / 20,
        }

    @torch.no_grad()
    def _update(self, leaves: dict[str, Tensor]) -> None:
        """Adam (Kingma and Ba 2015) with bias correction."""
        beta1, beta2 = _ADAM_BETAS
        count = self.step + 1
        for name, rate in self._rates().items():
            gradient = leaves[name].grad
            parameter = leaves[name].detach()
            if gradient is not None and gradient.numel():
                mean, square = self.moments[name]
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                scale = rate / (1 - beta1**count)
                parameter.addcdiv_(mean, (square / (1 - beta2**count)).sqrt_().add_(_ADAM_EPS), value=-scale)
            self.parameters[name] = parameter

    @torch.no_grad()
    def _densify(self, last: int) -> None:
        p, s = self.parameters, self.settings
        keep = densify.kept(p["log_scales"], p["logit_opacities"], self.extent)
        if int(keep.sum()) < 4:
            raise SceneError(f"all Gaussians became transparent at step {self.step}; the cameras do not fit the photos")
        rows = keep.nonzero()[:, 0]
        self._take({name: value[rows] for name, value in p.items()}, rows)
        room = densify.budget(self.step, last, self.start_count, s.max_gaussians) - len(rows)
        if room > 0:
            grown, origin = densify.grow(self.parameters, self.growth.score()[rows], room, self.extent, self.generator)
            self._take(grown, origin)
        self.growth = densify.Growth.empty(len(self.parameters["means"]), self.device)

    def _take(self, parameters: dict[str, Tensor], origin: Tensor) -> None:
        """Replace the parameters; moments follow their rows, new rows (-1) start at zero."""
        old, new = origin.clamp_min(0), origin < 0
        for name, (mean, square) in self.moments.items():
            moved = mean[old], square[old]
            for moment in moved:
                moment[new] = 0
            self.moments[name] = moved
        self.parameters = parameters

    def save(self, path: Path) -> None:
        """Write the whole state atomically."""
        temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(self._state(), temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Continue from a saved state of the same settings and photos; anything else is ignored and overwritten."""
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["inputs"] != self._inputs():
            return
        self.parameters, self.moments = state["parameters"], state["moments"]
        self.growth = densify.Growth(*state["growth"])
        self.generator.set_state(state["generator"].cpu())
        self.order, self.step = state["order"], state["step"]

    def _state(self) -> dict[str, Any]:
        return {
            "inputs": self._inputs(),
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "moments": self.moments,
            "growth": (self.growth.gradient, self.growth.seen),
            "generator": self.generator.get_state(),
            "order": self.order,
            "step": self.step,
        }

    def _inputs(self) -> dict[str, Any]:
        photos = [round(float(photo.mean()), 6) for photo, _ in self.levels[1]]
        return {"settings": asdict(self.settings), "start": self.start_count, "photos": photos}


def _prepared(views: Sequence[TrainingView], factor: float, device: torch.device) -> list[tuple[Tensor, Camera]]:
    scaled = [view if factor == 1.0 else view.resized(factor) for view in views]
    return [(view.photo.to(device), view.camera.to(device)) for view in scaled]
