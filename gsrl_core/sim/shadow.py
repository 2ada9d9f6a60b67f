"""Contact shadows: soft darkening of the table (z = 0) under bodies that are near it.

Splats of a captured bench hold the light of an empty bench. A body is taken for the ellipsoid of its own Gaussians; its
footprint is that ellipsoid's shadow under light from straight above, wider and weaker the higher the body is.

Only additions, products and quotients act on pixels, because these give the same bits on every device and for every
batch, which exponentials do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.sim.passes import passes
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene

REACH = 3.0
"""The shadow ends this many standard deviations of the footprint away from its centre; a box has 1.3 in itself."""
FADE_HEIGHT = 0.1
"""A body whose underside is this high throws no contact shadow (m)."""
SPREAD = 0.4
"""The footprint's standard deviation grows by this much per metre of height."""
SMALLEST = 0.003
"""Least standard deviation of a footprint (m)."""
TABLE_BAND = 0.03
"""The static surface counts as table up to this distance from z = 0, and fades over as much again (m): fitted splats
put a table no better."""
_UNDERSIDE = 1.5
"""Standard deviations from a body's centre to its underside; a box has 1.3."""


@dataclass(frozen=True)
class Footprints:
    """Shadows on the table, k of them for each of b environments; unused places have strength 0."""

    center: Tensor
    """float32 [b, k, 2]: x, y (m)."""
    inverse: Tensor
    """float32 [b, k, 3]: xx, twice xy and yy of the inverse covariance (1/m^2)."""
    strength: Tensor
    """float32 [b, k] in [0, 1]."""


class ContactShadow:
    """Darkens pictures of one scene."""

    def __init__(self, scene: Scene, intensity: float) -> None:
        """Measure the bodies; ``intensity`` in [0, 1] is the darkening right under a body that touches the table."""
        self.intensity = intensity
        moments = [_moments(scene.part(name)) for name in scene.names]
        self._center = np.array([center for center, _ in moments]).reshape(-1, 3)
        self._covariance = np.array([covariance for _, covariance in moments]).reshape(-1, 3, 3)
        # A body without Gaussians is not seen and throws no shadow.
        self._drawn = np.array([len(scene.part(name)) > 0 for name in scene.names], bool)

    def footprints(self, body_to_world: Tensor) -> Footprints:
        """Shadows of bodies at ``body_to_world`` [b, M, 4, 4] (in the scene's order), on the CPU."""
        poses = body_to_world.double().cpu().numpy()
        rotation = poses[..., :3, :3]
        center = (rotation @ self._center[..., None])[..., 0] + poses[..., :3, 3]
        covariance = rotation @ self._covariance @ rotation.swapaxes(-1, -2)
        height = np.maximum(center[..., 2] - _UNDERSIDE * np.sqrt(covariance[..., 2, 2]), 0)
        strength = self._drawn * np.maximum(1 - height / FADE_HEIGHT, 0) ** 2
        blur = SMALLEST**2 + (SPREAD * height) ** 2
        xx, xy, yy = (covariance[..., 0, 0] + blur, covariance[..., 0, 1], covariance[..., 1, 1] + blur)
        inverse = np.stack([yy, -2 * xy, xx], axis=-1) / (xx * yy - xy * xy)[..., None]
        # The darkest first, and no more places than some environment needs: most links are far above the table.
        order = np.argsort(-strength, axis=1, kind="stable")[:, : int((strength > 0).sum(axis=1).max(initial=0))]
        chosen = (np.take_along_axis(a, order[..., None], axis=1) for a in (center[..., :2], inverse))
        arrays = (*chosen, np.take_along_axis(strength, order, axis=1))
        return Footprints(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))

    def darken(self, rgb: Tensor, frames: Frames, camera: Camera, rays: Tensor, body_to_world: Tensor) -> Tensor:
        """The picture with shadows on the static table.

        Args:
            rgb: uint8 [b, h, w, 3].
            frames: its depth, alpha and body id, [b, h, w].
            camera: where it was taken from, 1 or b poses; its intrinsics are not read.
            rays: float32 [h, w, 2], X/Z and Y/Z in camera axes.
            body_to_world: [b, M, 4, 4] in the scene's order.

        Returns:
            uint8 [b, h, w, 3].
        """
        assert frames.depth is not None and frames.alpha is not None and frames.body_id is not None
        prints = self.footprints(body_to_world)
        if not prints.strength.shape[1]:
            return rgb
        place = [t.to(rgb.device) for t in (prints.center, prints.inverse, prints.strength)]
        rays, view = rays.to(rgb.device), camera.world_to_camera.to(rgb.device)
        out = torch.empty_like(rgb)
        for part in passes(rgb, 3 * rays[..., 0].numel()):
            eye, direction = _sight(view if len(view) == 1 else view[part], rays)
            shade = _shade(eye, direction, Footprints(*(t[part] for t in place)))
            above = eye[:, 2] + frames.depth[part] * direction[2]
            table = (2 - above.abs() / TABLE_BAND).clamp(0, 1)
            static = (frames.body_id[part] < 0) & (frames.alpha[part] >= 0.5) & (direction[2] < 0)
            light = 1 - self.intensity * shade * table * static
            out[part] = (rgb[part] * light[..., None]).round().to(torch.uint8)
        return out


def _moments(gaussians: Gaussians) -> tuple[np.ndarray, np.ndarray]:
    # Mean [3] and covariance [3, 3] of a body's opacity, in its frame (m, m^2).
    if not len(gaussians):
        return np.zeros(3), np.eye(3)
    means = gaussians.means.detach().double().cpu().numpy()
    weight = torch.sigmoid(gaussians.logit_opacities.detach().double()).cpu().numpy()
    weight = weight / weight.sum()
    center = weight @ means
    offset = means - center
    sizes = (2 * gaussians.log_scales.detach().double()).exp().mean(-1).cpu().numpy()
    return center, (weight[:, None] * offset).T @ offset + (weight @ sizes) * np.eye(3)


def _sight(world_to_camera: Tensor, rays: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    # Eyes [c, 3, 1, 1] and world directions, each [c, h, w], of one metre along the camera's z axis.
    r, t = world_to_camera[:, :3, :3, None, None], world_to_camera[:, :3, 3, None, None]
    x, y = rays[..., 0], rays[..., 1]
    eye = [-(r[:, 0, i] * t[:, 0] + r[:, 1, i] * t[:, 1] + r[:, 2, i] * t[:, 2]) for i in range(3)]
    direction = [r[:, 0, i] * x + r[:, 1, i] * y + r[:, 2, i] for i in range(3)]
    return torch.stack(eye, dim=1), (direction[0], direction[1], direction[2])


def _shade(eye: Tensor, direction: tuple[Tensor, Tensor, Tensor], prints: Footprints) -> Tensor:
    # [b, h, w] in [0, 1] where the pixels' rays meet z = 0; the darkest footprint counts, not their sum.
    along = eye[:, 2] / direction[2].clamp(max=-1e-6)
    x, y = eye[:, 0] - along * direction[0], eye[:, 1] - along * direction[1]
    shade = x.new_zeros(len(prints.strength), *x.shape[1:])
    for k in range(prints.strength.shape[1]):
        center, inverse = prints.center[:, k, :, None, None], prints.inverse[:, k, :, None, None]
        dx, dy = x - center[:, 0], y - center[:, 1]
        distance = (inverse[:, 0] * dx + inverse[:, 1] * dy) * dx + inverse[:, 2] * dy * dy
        inside = (1 - distance / REACH**2).clamp(min=0)
        shade = torch.maximum(shade, inside * inside * prints.strength[:, k, None, None])
    return shade
