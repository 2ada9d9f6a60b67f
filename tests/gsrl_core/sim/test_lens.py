"""Distorted cameras against OpenCV, whose convention they follow."""

import cv2
import numpy as np
import pytest
import torch
from sim_helpers import PoseRasterizer, bench_scene, empty_scene, sim_config

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.camera import Camera, intrinsics
from gsrl_core.sections import CameraConfig
from gsrl_core.sim import lens, passes
from gsrl_core.sim.cameras import CameraRig
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.lens import Lens, distort, undistort
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.raster_numba import NumbaRasterizer

BARREL = (-0.28, 0.09, 0.001, -0.002, -0.01)
PINCUSHION = (0.15, -0.03, -0.002, 0.001, 0.002)
WIDTH, HEIGHT = 64, 48
K = intrinsics(58.0, 60.0, 33.5, 22.0)
CAMERA = Camera(torch.eye(4)[None], K[None], WIDTH, HEIGHT)


@pytest.mark.parametrize("coefficients", [BARREL, PINCUSHION])
def test_points_go_where_opencv_projects_them(coefficients):
    points = np.random.default_rng(0).uniform([-0.4, -0.3, 1], [0.4, 0.3, 1], (50, 3))
    expected, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), K.double().numpy(), np.array(coefficients))
    seen = distort(torch.from_numpy(points[:, :2]), coefficients)
    pixels = seen * K.diagonal()[:2].double() + K[:2, 2].double()
    np.testing.assert_allclose(pixels, expected[:, 0], atol=1e-9)
    np.testing.assert_allclose(undistort(seen, coefficients), points[:, :2], atol=1e-9)


@pytest.mark.parametrize("coefficients", [BARREL, PINCUSHION])
def test_bending_undoes_opencvs_rectification(coefficients):
    """Each pinhole pixel's place in the lens's picture (OpenCV's map), looked up in our map, is that pixel again."""
    bent = Lens(CAMERA, coefficients)
    # OpenCV puts pixel centres at whole numbers.
    centered = K.double().numpy() - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    there = cv2.initUndistortRectifyMap(centered, np.array(coefficients), None, centered, (WIDTH, HEIGHT), cv2.CV_32FC1)
    for row, column in [(24, 32), (10, 12), (40, 50), (30, 8)]:
        back = cv2.remap(bent.rays.numpy(), *(m[row : row + 1, column : column + 1] for m in there), cv2.INTER_LINEAR)
        expected = [(column - centered[0, 2]) / centered[0, 0], (row - centered[1, 2]) / centered[1, 1]]
        np.testing.assert_allclose(back.ravel(), expected, atol=1e-3)


def test_a_barrel_lens_is_drawn_with_a_margin_that_covers_its_border():
    bent = Lens(CAMERA, BARREL)
    pinhole = bent.pinhole(CAMERA)
    assert pinhole.width > WIDTH
    assert pinhole.height > HEIGHT
    # A picture whose values are its own ray coordinates: bending it must give the rays that each pixel sees, at the
    # border too, where a missing margin would repeat the last column.
    found = bent.bend(lens.pinhole_rays(pinhole)[None])[0]
    torch.testing.assert_close(found, bent.rays, atol=2e-6, rtol=0)


def test_no_distortion_is_the_identity_bit_for_bit():
    for absent in (None, (0.0,) * 5):
        config = CameraConfig(width=WIDTH, height=HEIGHT, fx=58, fy=60, cx=33.5, cy=22, distortion=absent)
        rig = CameraRig((config,), 1)
        frames = Frames(torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8))
        assert rig.finished(rig.first, frames) is frames
    through_the_grid = Lens(CAMERA, (0.0,) * 5)
    assert (through_the_grid.width, through_the_grid.height) == (WIDTH, HEIGHT)
    picture = torch.randint(256, (2, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(through_the_grid.bend(picture), picture)


def test_batches_cut_into_passes_give_the_same_bits(monkeypatch):
    bent = Lens(CAMERA, BARREL)
    picture = torch.randint(256, (5, bent.height, bent.width, 3), generator=torch.Generator().manual_seed(0))
    picture = picture.to(torch.uint8)
    together = bent.bend(picture)
    monkeypatch.setitem(passes.PASS_VALUES, "cpu", 2 * bent.height * bent.width * 3)
    assert torch.equal(bent.bend(picture), together)
    assert torch.equal(bent.bend(picture[3:4])[0], together[3])


def test_depth_and_body_ids_are_not_mixed():
    bent = Lens(CAMERA, BARREL)
    halves = torch.zeros(1, bent.height, bent.width)
    halves[..., bent.width // 2 :] = 7
    frames = Frames(torch.zeros(1, bent.height, bent.width, 3, dtype=torch.uint8), halves, halves / 7, halves.short())
    seen = bent.bend_frames(frames)
    assert seen.depth.unique().tolist() == [0, 7]
    assert seen.body_id.unique().tolist() == [0, 7]
    assert seen.body_id.dtype == torch.int16
    assert seen.alpha.shape == (1, HEIGHT, WIDTH)
    assert ((seen.alpha > 0) & (seen.alpha < 1)).any()


@pytest.mark.parametrize("coefficients", [(-2.0, 0, 0, 0, 0), (-3.0, 3.0, 0, 0, 0), (float("nan"), 0, 0, 0, 0)])
def test_a_lens_that_folds_its_picture_is_refused(coefficients):
    with pytest.raises(SimulationError, match="folds"):
        Lens(CAMERA, coefficients)


def test_the_environment_shows_the_lens():
    """The cube's centre is drawn where OpenCV projects it through the lens."""
    given, strong = CameraConfig(), (3.0, 0.0, 0.02, -0.02, 0.0)
    distorted = given.model_copy(update={"distortion": strong})
    config = sim_config(num_envs=1, cameras=(distorted,), render_downscale=4)
    with make_env(config, bench_scene(), NumbaRasterizer()) as env:
        picture = env.reset([3]).rgb[given.name]
        assert picture.shape == (1, 120, 160, 3)
        body = env.frames()[given.name].body_id[0]
        center = env.privileged()["cube_pose"][0, :3]
    rows, columns = (body == 0).nonzero(as_tuple=True)
    found = [columns.float().mean() + 0.5, rows.float().mean() + 0.5]
    pinhole = CameraRig((given,), 4).cameras(torch.eye(4).repeat(1, 13, 1, 1), torch.eye(4)[None])[given.name]
    in_camera = (pinhole.world_to_camera[0, :3, :3] @ center + pinhole.world_to_camera[0, :3, 3]).double().numpy()
    expected, _ = cv2.projectPoints(
        in_camera[None], np.zeros(3), np.zeros(3), pinhole.K[0].double().numpy(), np.array(strong)
    )
    np.testing.assert_allclose(found, expected[0, 0], atol=1.0)
    plain, _ = cv2.projectPoints(in_camera[None], np.zeros(3), np.zeros(3), pinhole.K[0].double().numpy(), None)
    assert np.abs(plain - expected).max() > 2


def test_the_rasterizer_is_asked_for_the_larger_pinhole():
    rasterizer = PoseRasterizer()
    distorted = CameraConfig().model_copy(update={"distortion": BARREL})
    with make_env(sim_config(cameras=(distorted,), render_downscale=8), empty_scene(), rasterizer) as env:
        assert env.reset([1, 2]).rgb[distorted.name].shape == (2, 60, 80, 3)
    camera = rasterizer.calls[-1][1][distorted.name]
    assert camera.width > 80
    assert camera.height > 60
