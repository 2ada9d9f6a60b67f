"""Renders captured into CUDA graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.cuda.plan import Plan
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.raster_cuda import CudaRasterizer
from gsrl_core.splat.raster_gsplat import check_batch
from gsrl_core.splat.scene import Scene


@dataclass
class Recording:
    """A captured render of a fixed number of environments: a CUDA graph that costs one launch.

    The pictures of one call are overwritten by the next. Poses of bodies and of the cameras named in ``moving`` may
    change from call to call; the other cameras stay where they were when recorded.

    Raises:
        SceneError: poses or cameras do not fit the scene, or ``moving`` names a camera that there is not.
    """

    rasterizer: CudaRasterizer
    scene: Scene
    poses: Tensor
    cameras: Mapping[str, Camera]
    moving: Collection[str] = ()
    extras: bool = False
    _plans: dict[str, Plan] = field(init=False)
    _graph: torch.cuda.CUDAGraph = field(init=False)
    _held: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_batch(self.scene, self.poses, self.cameras)
        if unknown := sorted(set(self.moving) - set(self.cameras)):
            raise SceneError(f"recording: moving cameras {unknown} are none of {sorted(self.cameras)}")
        device = self.rasterizer.device
        self.poses = self.poses.to(device, torch.float32).clone(memory_format=torch.contiguous_format)
        with self.rasterizer.turn, torch.cuda.device(device):
            self._capture()

    @torch.no_grad()
    def _capture(self) -> None:
        rasterizer = self.rasterizer
        plans = rasterizer.plan(self.scene, len(self.poses), self.cameras, self.extras, moving=self.moving)
        self._plans = rasterizer.draw_fitting(plans, self.poses)
        # Not the whole device: that would break the capture of another thread.
        torch.cuda.current_stream(rasterizer.device).synchronize()
        self._held = rasterizer.held()  # the graph knows only their addresses
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(rasterizer.device)
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            rasterizer.draw(self._plans, self.poses)

    @torch.no_grad()
    def __call__(
        self, body_to_world: Tensor, cameras: Mapping[str, Camera] | None = None, *, check: bool = True
    ) -> dict[str, Frames]:
        """Draw again.

        Args:
            body_to_world: [B, M, 4, 4], B as recorded.
            cameras: new poses and intrinsics of moving cameras; as many poses and pixels as recorded.
            check: make sure that all entries had room, and record again with more if not; synchronises. Without it the
                caller has to call :meth:`fitted`.

        Raises:
            SceneError: a camera that is not moving, or other numbers than recorded.
        """
        given = dict(cameras or {})
        check_same_batch(self.poses, body_to_world)
        check_moved(self.cameras, self.moving, given)
        with self.rasterizer.turn, torch.cuda.device(self.rasterizer.device):
            self.poses.copy_(body_to_world)
            for name, camera in given.items():
                self._plans[name].camera.world_to_camera.copy_(camera.world_to_camera)
                self._plans[name].camera.K.copy_(camera.K)
            self._graph.replay()
            if check and self.rasterizer.grow(self._plans):
                self.cameras = {**self.cameras, **given}
                self._capture()
        return {name: plan.out for name, plan in self._plans.items() if plan.out is not None}

    def fitted(self) -> bool:
        """Whether all entries of the last call had room. Synchronises."""
        with self.rasterizer.turn:
            return not self.rasterizer.grow(self._plans)


def check_same_batch(recorded: Tensor, body_to_world: Tensor) -> None:
    """Refuse poses of another shape than recorded.

    Raises:
        SceneError: ``body_to_world`` has it.
    """
    if body_to_world.shape != recorded.shape:
        raise SceneError(
            f"recording: body_to_world is {tuple(body_to_world.shape)}, was recorded as {tuple(recorded.shape)}"
        )


def check_moved(recorded: Mapping[str, Camera], moving: Collection[str], given: Mapping[str, Camera]) -> None:
    """Refuse cameras whose new poses a recording could not draw.

    Raises:
        SceneError: one is not moving, or differs from the recorded in the number of poses or pixels.
    """
    for name, camera in given.items():
        if name not in moving:
            raise SceneError(
                f"recording: camera {name!r} was recorded as standing still; leave it out, or name it in moving "
                f"(now: {', '.join(moving) or 'none'})"
            )
        sizes = [(len(c), c.width, c.height) for c in (camera, recorded[name])]
        if sizes[0] != sizes[1]:
            raise SceneError(f"recording: camera {name!r} has (poses, w, h) {sizes[0]}, was recorded with {sizes[1]}")
