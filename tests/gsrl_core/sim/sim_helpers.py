"""What the simulation's tests share: a scene without looks and a rasterizer that shows poses as colours."""

import pytest
import torch
from sapien import render

from gsrl_core.geometry import props
from gsrl_core.interfaces import Frames
from gsrl_core.sections import CameraConfig, SimConfig
from gsrl_core.sim.task import body_names
from gsrl_core.sim.tasks import load_task
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.scene import Scene

TINY_CAMERA = CameraConfig(width=32, height=24, fx=30.0, fy=30.0, cx=16.0, cy=12.0)


PUT = load_task("PutCubeOnPlate-v0")
BODIES = body_names(PUT)


def empty_scene(names=BODIES):
    nothing = Gaussians(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 1, 3))
    return Scene(nothing, torch.zeros(0, dtype=torch.int16), tuple(names), torch.eye(4).repeat(len(names), 1, 1))


class PoseRasterizer:
    """Paints each picture with a colour derived from the last body's position, and keeps what it was asked to draw."""

    def __init__(self):
        self.calls = []

    def render(self, scene, body_to_world, cameras, *, extras=False):
        self.calls.append((body_to_world.clone(), cameras))
        color = (body_to_world[:, -1, :3, 3] * 200).abs().clamp(0, 255).to(torch.uint8)
        return {
            name: Frames(color[:, None, None].expand(-1, camera.height, camera.width, 3).contiguous())
            for name, camera in cameras.items()
        }


def sim_config(**changes):
    return SimConfig(
        **{"num_envs": 2, "workers": 1, "sim_hz": 100, "solver_iterations": 8, "cameras": (TINY_CAMERA,)} | changes
    )


def blobs(means, scales, color):
    """Opaque Gaussians of one colour."""
    count = len(means)
    return Gaussians(
        means,
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.tensor(scales).log().expand(count, 3).contiguous(),
        torch.full((count,), 6.0),
        colors_to_harmonics(torch.tensor([color]).expand(count, 3)),
    )


def cube_blobs():
    """The task's cube, red, in its own frame."""
    side = torch.linspace(-props.CUBE_HALF, props.CUBE_HALF, 7)
    grid = torch.cartesian_prod(side, side, side)
    return blobs(grid[(grid.abs() > 0.99 * props.CUBE_HALF).any(dim=1)], [0.004] * 3, [0.8, 0.1, 0.1])


def bench_scene():
    """A grey table top that ends inside the picture, and the cube on it as the only body."""
    x, y = torch.arange(0.25, 0.65, 0.01), torch.arange(-0.1, 0.3, 0.01)
    plane = torch.cartesian_prod(x, y)
    table = blobs(torch.cat([plane, torch.full((len(plane), 1), -0.002)], dim=1), [0.008, 0.008, 0.001], [0.6] * 3)
    return Scene.from_parts(table, {"cube": (cube_blobs(), torch.eye(4))})


def skip_without_vulkan():
    """SAPIEN's pictures need a device: a GPU's, or Mesa's on the processor."""
    try:
        render.RenderSystem()
    except RuntimeError as error:
        pytest.skip(f"no Vulkan device for SAPIEN's own renderer: {error}")
