"""The renderer that the targets are measured against: ManiSkill-GS's method, written anew from its description.

Every environment's splats are copied onto a grid 5 m apart and moved there on each frame with gathered 4 x 4 matrices;
cameras are drawn in micro-batches of 4, each over the splats of all environments; colours carry 16 harmonics of which
only the first is used; pictures are composited over a cached background (alpha applied twice), copied to the host as
float32 and become uint8 there. With gsplat 1.5.3, whose opacity-aware radii favour it over the 1.4.0 that it pins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.geometry.rotation import make_rigid, matrix_to_quat, quat_multiply
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene

SPACING = 5.0
"""Between environments (m)."""
MICRO_BATCH = 4


class SeedRenderer:
    """Draws one fixed camera of many environments."""

    def __init__(self, scene: Scene, camera: Camera, environments: int, device: str = "cuda") -> None:
        from gsplat import rasterization

        self.rasterize, self.size = rasterization, (camera.width, camera.height)
        moving = scene.body >= 0
        part = scene.gaussians.select(moving).with_sh_degree(3).to(device)
        self.body = scene.body[moving].long().to(device)
        side = int(environments**0.5 + 0.999)
        index = torch.arange(environments, device=device)
        offset = torch.stack([index % side, index // side, torch.zeros_like(index)], dim=1) * SPACING
        self.shift = make_rigid(torch.eye(3, device=device), offset.float())
        self.means = torch.nn.functional.pad(part.means, (0, 1), value=1.0)[None, :, :, None]
        self.quats = torch.nn.functional.normalize(part.quats, dim=-1)

        def copies(tensor: Tensor) -> Tensor:
            return tensor.repeat(environments, *(1,) * (tensor.ndim - 1))

        self.scales, self.opacities = copies(part.log_scales.exp()), copies(torch.sigmoid(part.logit_opacities))
        self.first, self.rest = copies(part.harmonics[:, :1]), copies(part.harmonics[:, 1:])
        self.views = camera.world_to_camera.to(device) @ torch.linalg.inv(self.shift)
        self.K = camera.K.to(device).expand(environments, 3, 3)
        self.background, self.background_depth = self._draw_background(
            scene.gaussians.select(~moving).to(device), camera
        )

    def _draw_background(self, static: Gaussians, camera: Camera) -> tuple[Tensor, Tensor]:
        drawn, _, _ = self.rasterize(
            static.means, static.quats, static.log_scales.exp(), torch.sigmoid(static.logit_opacities),
            static.harmonics, camera.world_to_camera.to(static.means), camera.K.to(static.means), *self.size,
            sh_degree=0, render_mode="RGB+ED", packed=False,
        )  # fmt: skip
        return drawn[..., :3].clamp(0, 1), drawn[..., 3:]

    @torch.no_grad()
    def __call__(self, body_to_world: Tensor) -> Tensor:
        """uint8 [E, h, w, 3] on the host, of body_to_world [E, M, 4, 4]."""
        poses = self.shift[:, None] @ body_to_world
        matrices = poses[:, self.body]
        means = torch.matmul(matrices, self.means)[..., :3, 0].flatten(0, 1)
        turns = matrix_to_quat(poses[..., :3, :3])[:, self.body]
        quats = quat_multiply(turns, self.quats.expand_as(turns)).flatten(0, 1)
        pictures = []
        for start in range(0, len(poses), MICRO_BATCH):
            chosen = slice(start, start + MICRO_BATCH)
            drawn, alpha, _ = self.rasterize(
                means, quats, self.scales, self.opacities, torch.cat([self.first, self.rest], dim=1),
                self.views[chosen], self.K[chosen], *self.size, sh_degree=0, render_mode="RGB+ED", packed=False,
            )  # fmt: skip
            rgb = (drawn[..., :3] + (1 - alpha) * 0.0).clamp(0, 1)
            alpha = alpha * (drawn[..., 3:] < self.background_depth)
            pictures.append((self.background * (1 - alpha) + rgb * alpha).cpu())
        return (torch.cat(pictures) * 255).to(torch.uint8)
