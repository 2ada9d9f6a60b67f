"""Depth, alpha and body ids on request, drawn by the CPU rasterizer from a small bench."""

import pytest
import torch
from sim_helpers import bench_scene, sim_config

from gsrl_core.errors import SimulationError
from gsrl_core.geometry import props
from gsrl_core.sections import CameraConfig
from gsrl_core.sim.cameras import CameraRig
from gsrl_core.sim.gs_env import make_env
from gsrl_core.splat.raster_numba import NumbaRasterizer


@pytest.fixture(scope="module")
def env():
    config = sim_config(cameras=(CameraConfig(),), render_downscale=4)
    with make_env(config, bench_scene(), NumbaRasterizer()) as env:
        with pytest.raises(SimulationError, match="before reset"):
            env.frames()
        yield env


def test_depth_alpha_and_body_id_agree_with_geometry(env):
    observation = env.reset([3, 4])
    frames = env.frames()["3rd_view_camera"]
    assert torch.equal(frames.rgb, observation.rgb["3rd_view_camera"])
    assert frames.depth.shape == frames.alpha.shape == frames.body_id.shape == (2, 120, 160)
    assert (frames.depth.dtype, frames.alpha.dtype, frames.body_id.dtype) == (
        torch.float32, torch.float32, torch.int16,
    )  # fmt: skip
    camera = CameraRig((CameraConfig(),), 4).cameras(env.body_poses(), torch.eye(4).repeat(2, 1, 1))["3rd_view_camera"]
    cubes = env.privileged()["cube_pose"][:, :3]
    for i, cube in enumerate(cubes):
        top = cube + torch.tensor([0.0, 0.0, props.CUBE_HALF])
        pixel, depth = camera.project(top[None])
        column, row = pixel[0, 0].floor().int().tolist()
        assert frames.body_id[i, row, column] == 0
        assert frames.alpha[i, row, column] > 0.95
        assert frames.depth[i, row, column].item() == pytest.approx(depth.item(), abs=0.01)
        # The table is seen where there is no cube, and beyond its end there is nothing.
        pixel, depth = camera.project(torch.tensor([[0.45, 0.0, 0.0]]))
        column, row = pixel[0, 0].floor().int().tolist()
        assert frames.body_id[i, row, column] == -1
        assert frames.alpha[i, row, column] > 0.95
        assert frames.depth[i, row, column].item() == pytest.approx(depth.item(), abs=0.01)
        nothing = frames.alpha[i] == 0
        assert nothing.any()
        assert (frames.depth[i][nothing] == 0).all()
        assert (frames.body_id[i][nothing] == -1).all()


def test_asking_changes_nothing(env):
    before = env.reset([3, 4]).rgb["3rd_view_camera"]
    env.frames()
    assert torch.equal(env.render_video_frame(), before)
