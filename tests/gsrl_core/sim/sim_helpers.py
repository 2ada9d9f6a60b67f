"""What the simulation's tests share: a scene without looks and a rasterizer that shows poses as colours."""

import torch

from gsrl_core.interfaces import Frames
from gsrl_core.sections import CameraConfig, SimConfig
from gsrl_core.sim import task
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene

TINY_CAMERA = CameraConfig(width=32, height=24, fx=30.0, fy=30.0, cx=16.0, cy=12.0)


def empty_scene(names=task.BODIES):
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
