"""Averages of blocks by hand, and a supersampled environment against its own large pictures."""

import pytest
import torch
from sim_helpers import bench_scene, sim_config

from gsrl_core.sections import CameraConfig
from gsrl_core.sim.cameras import CameraRig
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.supersample import averaged
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.raster_numba import NumbaRasterizer

STILL = torch.eye(4)[None]


def test_means_of_blocks_by_hand():
    rgb = torch.tensor([[0, 10], [20, 33]], dtype=torch.uint8)[None, :, :, None].expand(1, 2, 2, 3)
    alpha = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    depth = torch.tensor([[[2.0, 0.0], [4.0, 6.0]]])
    body = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.int16)
    seen = averaged(Frames(rgb.contiguous(), depth, alpha, body), 2)
    assert seen.rgb.tolist() == [[[[16, 16, 16]]]]  # 63 / 4 = 15.75
    assert seen.alpha.tolist() == [[[0.5]]]
    assert seen.depth.item() == pytest.approx((2 * 1 + 4 * 0.5 + 6 * 0.5) / 2)
    assert seen.body_id.tolist() == [[[3]]]
    assert averaged(Frames(rgb, depth * 0, alpha * 0, body), 2).depth.item() == 0.0
    plain = Frames(rgb)
    assert averaged(plain, 1) is plain


def test_what_is_drawn_is_larger_and_what_is_seen_is_not():
    rig = CameraRig((CameraConfig(),), 4, 2)
    drawn = rig.cameras(torch.eye(4).repeat(1, 13, 1, 1), STILL)[rig.first]
    assert (drawn.width, drawn.height) == (320, 240)
    assert rig.sizes() == {rig.first: (120, 160)}
    assert rig.rays()[rig.first].shape == (120, 160, 2)
    torch.testing.assert_close(drawn.K[0, 0, 0], torch.tensor(604.152161 / 2))


def test_a_supersampled_environment_shows_the_mean_of_the_large_picture():
    scene = bench_scene()
    large = sim_config(num_envs=1, cameras=(CameraConfig(),), render_downscale=4)
    small = sim_config(num_envs=1, cameras=(CameraConfig(),), render_downscale=8, render_supersample=2)
    with make_env(large, scene, NumbaRasterizer()) as env:
        expected = averaged(Frames(env.reset([5]).rgb["3rd_view_camera"]), 2).rgb
    with make_env(small, scene, NumbaRasterizer()) as env:
        seen = env.reset([5]).rgb["3rd_view_camera"]
        assert env.frames()["3rd_view_camera"].depth.shape == (1, 60, 80)
    assert torch.equal(seen, expected)
    direct = sim_config(num_envs=1, cameras=(CameraConfig(),), render_downscale=8)
    with make_env(direct, scene, NumbaRasterizer()) as env:
        assert not torch.equal(env.reset([5]).rgb["3rd_view_camera"], expected), "the small picture is another one"


def test_pictures_drawn_in_groups_are_the_same_bits(monkeypatch):
    def pictures():
        sim = sim_config(num_envs=3, cameras=(CameraConfig(),), render_downscale=8, render_supersample=2)
        with make_env(sim, bench_scene(), rasterizer := Counting()) as env:
            return env.reset([1, 2, 3]).rgb[env._rig.first], rasterizer.batches

    class Counting(NumbaRasterizer):
        def __init__(self):
            super().__init__()
            self.batches = []

        def render(self, scene, body_to_world, cameras, *, extras=False):
            self.batches.append(len(body_to_world))
            return super().render(scene, body_to_world, cameras, extras=extras)

    whole, batches = pictures()
    assert batches == [3]
    monkeypatch.setattr("gsrl_core.sim.gs_env._PIXELS_AT_ONCE", 2 * 160 * 120)
    grouped, batches = pictures()
    assert batches == [2, 1]
    assert torch.equal(whole, grouped)
