"""Renders captured into CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.cuda.plan import Plan
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.raster_cuda import CudaRasterizer
from gsrl_core.splat.raster_gsplat import check_batch
from gsrl_core.splat.scene import Scene


@dataclass
class Recording:
    """A captured render of a fixed number of environments: a CUDA graph that costs one launch.

    The pictures of one call are overwritten by the next. Poses of bodies may change from call to call, and so may those
    of cameras that have one for each environment; a camera with a single pose must stay where it was when recorded.
    """

    rasterizer: CudaRasterizer
    scene: Scene
    poses: Tensor
    cameras: Mapping[str, Camera]
    extras: bool = False
    _plans: dict[str, Plan] = field(init=False)
    _graph: torch.cuda.CUDAGraph = field(init=False)
    _held: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_batch(self.scene, self.poses, self.cameras)
        device = self.rasterizer.device
        self.poses = self.poses.to(device, torch.float32).clone(memory_format=torch.contiguous_format)
        self._capture()

    @torch.no_grad()
    def _capture(self) -> None:
        rasterizer = self.rasterizer
        cameras = {name: _copied(camera) if len(camera) > 1 else camera for name, camera in self.cameras.items()}
        plans = rasterizer.plan(self.scene, len(self.poses), cameras, self.extras, moving=True)
        self._plans = rasterizer.draw_fitting(plans, self.poses)
        torch.cuda.synchronize(rasterizer.device)
        self._held = rasterizer.held()  # the graph knows only their addresses
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            rasterizer.draw(self._plans, self.poses)

    @torch.no_grad()
    def __call__(
        self, body_to_world: Tensor, cameras: Mapping[str, Camera] | None = None, *, check: bool = True
    ) -> dict[str, Frames]:
        """Draw again.

        Args:
            body_to_world: [B, M, 4, 4], B as recorded.
            cameras: new poses and intrinsics of the cameras that have one pose for each environment.
            check: make sure that all entries had room, and record again with more if not; synchronises. Without it the
                caller has to call :meth:`fitted`.
        """
        self.poses.copy_(body_to_world)
        for name, camera in (cameras or {}).items():
            if len(camera) > 1:
                self._plans[name].camera.world_to_camera.copy_(camera.world_to_camera)
                self._plans[name].camera.K.copy_(camera.K)
        self._graph.replay()
        if check and not self.fitted():
            self.cameras = {**self.cameras, **(cameras or {})}
            self._capture()
        return {name: plan.out for name, plan in self._plans.items() if plan.out is not None}

    def fitted(self) -> bool:
        """Whether all entries of the last call had room. Synchronises."""
        return not self.rasterizer.grow(self._plans)


def _copied(camera: Camera) -> Camera:
    return Camera(camera.world_to_camera.clone(), camera.K.clone(), camera.width, camera.height)
