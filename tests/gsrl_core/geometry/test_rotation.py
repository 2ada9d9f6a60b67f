import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from gsrl_core.geometry import rotation as rot


@pytest.fixture
def quats():
    return torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def scipy_of(quats):
    return Rotation.from_quat(quats[:, [1, 2, 3, 0]].numpy())


def test_matrices_are_rotations_and_agree_with_scipy(quats):
    matrices = rot.quat_to_matrix(quats)
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3, dtype=torch.float64).expand_as(matrices))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(matrices, torch.from_numpy(scipy_of(quats).as_matrix()))


def test_a_quarter_turn_about_z_takes_x_to_y():
    quarter = rot.quat_to_matrix(torch.tensor([math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)]))
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))


def test_product_of_quaternions_is_product_of_matrices(quats):
    a, b = quats[:100], quats[100:]
    product = rot.quat_to_matrix(rot.quat_multiply(a, b))
    torch.testing.assert_close(product, rot.quat_to_matrix(a) @ rot.quat_to_matrix(b))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, math.pi - 1e-9, math.pi])
def test_round_trips_hold_at_every_angle(angle):
    axes = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -2, 3]]).double(), dim=-1)
    matrices = rot.rotvec_to_matrix(axes * angle)
    torch.testing.assert_close(matrices, torch.from_numpy(Rotation.from_rotvec((axes * angle).numpy()).as_matrix()))
    torch.testing.assert_close(rot.quat_to_matrix(rot.matrix_to_quat(matrices)), matrices)
    back = rot.matrix_to_rotvec(matrices)
    torch.testing.assert_close(rot.rotvec_to_matrix(back), matrices)
    torch.testing.assert_close(back.norm(dim=-1), torch.full((4,), angle).double(), atol=1e-7, rtol=1e-7)


def test_quaternions_come_back_normalised_with_positive_w(quats):
    back = rot.matrix_to_quat(rot.quat_to_matrix(quats))
    expected = torch.nn.functional.normalize(quats, dim=-1) * torch.where(quats[:, :1] < 0, -1, 1)
    torch.testing.assert_close(back, expected)


def test_euler_angles_follow_their_named_orders(quats):
    angles = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    intrinsic = Rotation.from_euler("XYZ", angles.numpy()).as_matrix()
    torch.testing.assert_close(rot.euler_xyz_to_matrix(angles), torch.from_numpy(intrinsic))
    torch.testing.assert_close(rot.matrix_to_euler_xyz(rot.euler_xyz_to_matrix(angles)), angles)
    fixed = Rotation.from_euler("xyz", angles.numpy()).as_matrix()
    torch.testing.assert_close(rot.rpy_to_matrix(angles), torch.from_numpy(fixed))


@pytest.mark.parametrize("pitch", [math.pi / 2, -math.pi / 2])
def test_gimbal_lock_still_gives_angles_of_the_same_rotation(pitch):
    matrix = rot.euler_xyz_to_matrix(torch.tensor([0.4, pitch, 0.3], dtype=torch.float64))
    angles = rot.matrix_to_euler_xyz(matrix)
    assert angles[2] == 0
    torch.testing.assert_close(rot.euler_xyz_to_matrix(angles), matrix, atol=1e-7, rtol=0)


def test_rigid_transforms_form_a_group(quats):
    rigid = rot.make_rigid(rot.quat_to_matrix(quats), quats[:, 1:])
    identity = torch.eye(4, dtype=torch.float64).expand_as(rigid)
    torch.testing.assert_close(rot.rigid_inverse(rigid) @ rigid, identity)
    torch.testing.assert_close(rot.rigid_inverse(rigid), torch.linalg.inv(rigid))
    points = torch.randn(200, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there_and_back = rot.transform_points(rot.rigid_inverse(rigid), rot.transform_points(rigid, points))
    torch.testing.assert_close(there_and_back, points)


def test_make_rigid_broadcasts_its_batch_axes():
    assert rot.make_rigid(torch.eye(3), torch.zeros(6, 2, 3)).shape == (6, 2, 4, 4)


def test_rigid_motions_are_those_of_each_row():
    turns, shifts = np.array([[0, 0, np.pi / 2], [0.1, -0.2, 0.3]]), np.array([[1.0, 2, 3], [0, 0, 0]])
    motions = rot.rigid_motions(turns, shifts)
    assert motions.dtype == torch.float32
    np.testing.assert_allclose(motions[0], [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(motions[1, :3, :3], Rotation.from_rotvec(turns[1]).as_matrix(), atol=1e-6)
