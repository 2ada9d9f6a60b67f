"""The set of Gaussians while it is fitted: parameters with their Adam state, growth and pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import quat_to_matrix
from gsrl_core.splat.gaussians import Gaussians

NAMES = ("means", "quats", "log_scales", "logit_opacities", "base", "detail")
"""Parameters; harmonics are split into their constant (``base`` [N, 1, 3]) and the rest (``detail`` [N, K - 1, 3])."""
LEARNING_RATES = {
    "means": 1.6e-4,  # per step and unit of scene extent
    "quats": 1e-3,
    "log_scales": 5e-3,
    "logit_opacities": 5e-2,
    "base": 2.5e-3,
    "detail": 2.5e-3 / 20,
}
"""Those of 3D Gaussian Splatting (Kerbl et al. 2023)."""
PRUNE_OPACITY = 0.005
PRUNE_EXTENT = 1.0
"""Gaussians with a larger standard deviation than this fraction of the scene's extent are removed."""
_SHRINK = 0.6
"""Standard deviation of a half along the split axis, relative to its parent's."""


class Trainable:
    """Parameters of N Gaussians and the optimizer that moves them; N changes."""

    def __init__(self, gaussians: Gaussians, extent: float) -> None:
        """Start from ``gaussians``.

        Args:
            gaussians: with harmonics of the final degree.
            extent: size of the scene; the means' learning rate is proportional to it.
        """
        self.extent = extent
        values = (*gaussians.tensors()[:4], gaussians.harmonics[:, :1], gaussians.harmonics[:, 1:])
        rates = dict(LEARNING_RATES)
        rates["means"] *= extent
        self.base_rates = rates
        groups: list[dict[str, Any]] = [
            {"params": [torch.nn.Parameter(value.detach().clone().contiguous())], "lr": rates[name], "name": name}
            for name, value in zip(NAMES, values, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)

    def __getitem__(self, name: str) -> torch.nn.Parameter:
        return self._group(name)["params"][0]

    def __len__(self) -> int:
        return len(self["means"])

    def set_rate(self, name: str, factor: float) -> None:
        """Set a parameter's learning rate to ``factor`` times its initial one."""
        self._group(name)["lr"] = self.base_rates[name] * factor

    def harmonics(self, degree: int) -> Tensor:
        """[N, (degree + 1)^2, 3], differentiable."""
        if degree == 0:
            return self["base"]
        return torch.cat([self["base"], self["detail"][:, : (degree + 1) ** 2 - 1]], dim=1)

    def gaussians(self) -> Gaussians:
        """A detached copy as plain Gaussians."""
        harmonics = torch.cat([self["base"], self["detail"]], dim=1)
        return Gaussians(*(t.detach().clone() for t in (*(self[name] for name in NAMES[:4]), harmonics)))

    def step(self) -> None:
        """Apply the gradients and clear them."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def select(self, index: Tensor) -> None:
        """Keep the Gaussians in ``index`` (bool [N] or int64) with their optimizer state."""
        self._replace(lambda value: value[index], lambda state: state[index])

    def split(self, index: Tensor, children: dict[str, Tensor]) -> None:
        """Replace the Gaussians ``index`` int64 [S] by two each: ``children`` hold [2 S, ...], first halves first.

        The first child takes its parent's place; both start with an empty optimizer state.
        """
        count = len(index)

        def grown(name: str) -> Callable[[Tensor], Tensor]:
            def change(value: Tensor) -> Tensor:
                value = value.clone()
                value[index] = children[name][:count]
                return torch.cat([value, children[name][count:]])

            return change

        def fresh(state: Tensor) -> Tensor:
            state = state.clone()
            state[index] = 0
            return torch.cat([state, state.new_zeros(count, *state.shape[1:])])

        for name in NAMES:
            self._replace(grown(name), fresh, (name,))

    def state(self) -> dict[str, Any]:
        """All that :meth:`restored` needs to continue with the same numbers."""
        moments = {
            name: {key: value.clone() for key, value in self.optimizer.state[self[name]].items()} for name in NAMES
        }
        return {"values": {name: self[name].detach().clone() for name in NAMES}, "moments": moments}

    @staticmethod
    def restored(state: dict[str, Any], extent: float) -> Trainable:
        """The set that :meth:`state` described."""
        values = state["values"]
        harmonics = torch.cat([values["base"], values["detail"]], dim=1)
        means, quats, log_scales, logit_opacities = (values[name] for name in NAMES[:4])
        made = Trainable(Gaussians(means, quats, log_scales, logit_opacities, harmonics), extent)
        for name in NAMES:
            if state["moments"][name]:
                made.optimizer.state[made[name]] = dict(state["moments"][name])
        return made

    def _group(self, name: str) -> dict[str, Any]:
        return self.optimizer.param_groups[NAMES.index(name)]

    def _replace(
        self,
        change: Callable[[Tensor], Tensor],
        change_state: Callable[[Tensor], Tensor],
        names: tuple[str, ...] = NAMES,
    ) -> None:
        for name in names:
            group = self._group(name)
            old = group["params"][0]
            new = torch.nn.Parameter(change(old.detach()).contiguous())
            moments = self.optimizer.state.pop(old, None)
            if moments:
                self.optimizer.state[new] = {
                    key: change_state(value) if value.ndim else value for key, value in moments.items()
                }
            group["params"] = [new]


class Growth:
    """Decides which Gaussians are split and which are removed.

    Each Gaussian's score is the mean length of its screen gradient, summed over pixels by absolute value (AbsGS, Ye et
    al. 2024) so that opposite wishes of its pixels do not cancel. The number of Gaussians follows a budget that rises
    to ``max_gaussians``, and splits drawn in proportion to the scores fill it (Taming 3DGS, Mallick et al. 2024).
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self.score = torch.zeros(count, device=device)
        self.seen = torch.zeros(count, device=device)

    def observe(self, gradient: Tensor, radii: Tensor, side: int) -> None:
        """Add one picture's ``gradient`` [N, 2] (loss per px); ``side`` makes it independent of the resolution (px)."""
        drawn = radii > 0
        self.score += torch.where(drawn, gradient.norm(dim=-1) * (0.5 * side), torch.zeros_like(self.score))
        self.seen += drawn

    def apply(self, model: Trainable, budget: int, generator: torch.Generator) -> dict[str, int]:
        """Prune, then split up to ``budget`` Gaussians; returns how many of each and forgets the scores."""
        keep = torch.sigmoid(model["logit_opacities"].detach()) >= PRUNE_OPACITY
        keep &= model["log_scales"].detach().amax(-1) <= math.log(PRUNE_EXTENT * model.extent)
        pruned = int((~keep).sum())
        if pruned == len(model):
            raise SceneError(
                f"fit: all {pruned} Gaussians became transparent or larger than the scene; the cameras do not fit the "
                "photos (look at transforms.json) or the photos show no texture"
            )
        score = (self.score / self.seen.clamp_min(1))[keep]
        if pruned:
            model.select(keep)
        room = min(budget - len(model), int((score > 0).sum()), len(model))
        if room > 0:
            index = torch.multinomial(score.cpu(), room, generator=generator).to(score.device)
            model.split(index, split_along_longest_axis(model, index))
        self.score, self.seen = (torch.zeros(len(model), device=score.device) for _ in range(2))
        return {"pruned": pruned, "split": max(room, 0)}


def split_along_longest_axis(model: Trainable, index: Tensor) -> dict[str, Tensor]:
    """Two halves of each Gaussian in ``index`` [S], side by side along its longest axis: name -> [2 S, ...].

    Together the halves have the parent's moments along that axis up to the second: offsets +-d and deviation s' with
    d^2 + s'^2 = s^2, and opacity o' with 2 o' s' = o s.
    """
    parents = {name: model[name].detach()[index] for name in NAMES}
    scales, axis = parents["log_scales"].exp().max(dim=-1)
    rotation = quat_to_matrix(parents["quats"])
    direction = torch.gather(rotation, 2, axis[:, None, None].expand(-1, 3, 1))[..., 0]
    offset = direction * (scales * math.sqrt(1 - _SHRINK**2))[:, None]
    log_scales = parents["log_scales"].clone()
    log_scales.scatter_add_(1, axis[:, None], torch.full_like(scales[:, None], math.log(_SHRINK)))
    opacities = torch.sigmoid(parents["logit_opacities"]) / (2 * _SHRINK)
    children = {name: torch.cat([value, value]) for name, value in parents.items()}
    children["means"] = torch.cat([parents["means"] + offset, parents["means"] - offset])
    children["log_scales"] = torch.cat([log_scales, log_scales])
    children["logit_opacities"] = torch.logit(torch.cat([opacities, opacities]))
    return children


def budget_at(step: int, start: int, stop: int, initial: int, final: int) -> int:
    """Number of Gaussians allowed at ``step``: from ``initial`` to ``final`` between ``start`` and ``stop``.

    Quadratic with zero slope at the end (Taming 3DGS, equation 2): most are added early, when they still have time to
    find their place.
    """
    if final <= initial or stop <= start:
        return initial
    rest = 1 - min(max((step - start) / (stop - start), 0.0), 1.0)
    return round(final - (final - initial) * rest**2)
