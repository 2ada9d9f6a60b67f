import math

import pytest
import torch

from gsrl_core.errors import CaptureError
from gsrl_core.geometry import camera as cams
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.sections import CameraConfig

SEED = CameraConfig()


@pytest.fixture
def camera():
    rotations = rotvec_to_matrix(torch.tensor([[0.1, 0.2, -0.3], [1.0, -0.5, 0.2]]))
    poses = make_rigid(rotations, torch.tensor([[0.1, 0.0, 1.0], [-0.3, 0.2, 2.0]]))
    K = torch.stack([cams.intrinsics(600, 610, 316.7, 243.2), cams.intrinsics(500, 490, 300.0, 260.0)])
    return cams.Camera(poses, K, 640, 480)


def seed_camera():
    return cams.from_sapien(SEED.position, SEED.rotation, SEED.fx, SEED.fy, SEED.cx, SEED.cy, SEED.width, SEED.height)


def test_projection_of_a_point_by_hand():
    camera = cams.Camera(torch.eye(4)[None], cams.intrinsics(100, 200, 32, 24)[None], 64, 48)
    pixels, depth = camera.project(torch.tensor([[0.5, -0.1, 2.0]]))
    assert pixels[0, 0].tolist() == pytest.approx([57.0, 14.0])
    assert depth.item() == 2.0


def test_unprojection_inverts_projection(camera):
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 0.0, 3.0])
    pixels, depth = camera.project(points)
    torch.testing.assert_close(camera.unproject(pixels, depth), points.expand(2, 20, 3), atol=1e-4, rtol=1e-4)


def test_scaling_moves_image_coordinates_by_the_true_size_ratio(camera):
    points = torch.rand(20, 3) + torch.tensor([0.0, 0.0, 3.0])
    small = camera.scaled(0.333)
    assert (small.width, small.height) == (213, 160)
    ratio = torch.tensor([213 / 640, 160 / 480])
    torch.testing.assert_close(small.project(points)[0], camera.project(points)[0] * ratio, atol=1e-3, rtol=1e-4)
    # Halving: the centre of the block of pixels (0, 0)..(1, 1) is image point (1, 1): pixel centre (0.5, 0.5).
    K = camera.scaled(0.5).K
    torch.testing.assert_close(K[:, :2], camera.K[:, :2] / 2)
    torch.testing.assert_close(K[:, 2], camera.K[:, 2])


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(camera, factor):
    with pytest.raises(CaptureError, match="positive"):
        camera.scaled(factor)


def test_selection_keeps_the_leading_axis(camera):
    assert camera.select(1).world_to_camera.shape == (1, 4, 4)
    torch.testing.assert_close(camera.select(-1).K, camera.K[1:])
    torch.testing.assert_close(camera.select(torch.tensor([1, 0])).K, camera.K.flip(0))
    with pytest.raises(IndexError):
        camera.select(2)


def test_sapien_pose_looks_along_its_first_axis():
    camera = seed_camera()
    position = torch.tensor(SEED.position)
    forward, left, up = torch.tensor(SEED.rotation).T
    torch.testing.assert_close(camera.centers[0], position, atol=1e-5, rtol=1e-5)
    pixels, depth = camera.project(torch.stack([position + forward, position + forward + 0.1 * left + 0.2 * up]))
    assert pixels[0, 0].tolist() == pytest.approx([SEED.cx, SEED.cy], abs=1e-2)
    assert pixels[0, 1].tolist() == pytest.approx([SEED.cx - 0.1 * SEED.fx, SEED.cy - 0.2 * SEED.fy], abs=1e-2)
    assert depth[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)


def test_the_seed_camera_sees_both_objects():
    pixels, depth = seed_camera().project(torch.tensor([[0.4, 0.2, 0.02], [0.45, 0.0, 0.02]]))
    assert ((pixels >= 0) & (pixels <= torch.tensor([640.0, 480.0]))).all() and (depth > 0.3).all()


def test_a_batch_of_sapien_poses_agrees_with_the_single_one():
    pose = make_rigid(torch.tensor(SEED.rotation), torch.tensor(SEED.position))
    batch = cams.sapien_to_world_to_camera(pose.expand(3, 4, 4))
    torch.testing.assert_close(batch, seed_camera().world_to_camera.expand(3, 4, 4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cams.to_sapien_pose(batch), pose.expand(3, 4, 4), atol=1e-5, rtol=1e-5)


def test_opengl_poses_look_down_their_negative_z_axis(camera):
    c2w = cams.to_opengl_c2w(camera.world_to_camera)
    torch.testing.assert_close(cams.from_opengl_c2w(c2w), camera.world_to_camera, atol=1e-6, rtol=1e-5)
    ahead = c2w[:, :3, 3] - c2w[:, :3, 2]
    above = ahead + c2w[:, :3, 1]
    pixels, depth = camera.project(torch.stack([ahead, above], dim=1))
    assert depth.flatten().tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    torch.testing.assert_close(pixels[:, 0], camera.K[:, :2, 2], atol=1e-2, rtol=0)
    assert (pixels[:, 1, 1] < pixels[:, 0, 1]).all()  # up in the world is up in the picture


def test_look_at_centres_its_target_upright():
    eye, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.2, 0.3, 0.1])
    camera = cams.Camera(cams.look_at(eye, target)[None], cams.intrinsics(100, 100, 32, 24)[None], 64, 48)
    pixels, depth = camera.project(torch.stack([target, target + torch.tensor([0, 0, 0.1])]))
    assert pixels[0, 0].tolist() == pytest.approx([32, 24], abs=1e-3)
    assert pixels[0, 1, 0].item() == pytest.approx(32, abs=1e-3) and pixels[0, 1, 1] < 24
    assert depth[0, 0].item() == pytest.approx((target - eye).norm().item(), rel=1e-5)
    with pytest.raises(CaptureError, match="up"):
        cams.look_at(eye, eye + torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    "rotation",
    [[[1, 0, 0], [0, 1, 0], [0, 0, -1]], [[2, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0.01, 0], [0, 1, 0], [0, 0, 1]]],
)
def test_a_matrix_that_is_no_rotation_is_refused(rotation):
    with pytest.raises(CaptureError, match="rotation"):
        cams.from_sapien((0, 0, 0), rotation, 1, 1, 0, 0, 4, 4)


def test_wrong_shapes_are_refused():
    with pytest.raises(CaptureError, match="leading axis"):
        cams.Camera(torch.eye(4), torch.eye(3), 4, 4)
    with pytest.raises(CaptureError, match="same C"):
        cams.Camera(torch.eye(4).expand(2, 4, 4), torch.eye(3)[None], 4, 4)
    with pytest.raises(CaptureError, match="1 x 1"):
        cams.Camera(torch.eye(4)[None], torch.eye(3)[None], 0, 4)
