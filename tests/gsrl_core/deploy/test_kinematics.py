from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsrl_core.deploy.kinematics import jacobian, link_poses, pose_error, solve_ik, tcp_pose
from gsrl_core.deploy.limits import SAFE_Q_MAX, SAFE_Q_MIN

SHARES = st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7)


def joints(shares):
    return SAFE_Q_MIN + np.array(shares) * (SAFE_Q_MAX - SAFE_Q_MIN)


@pytest.fixture(scope="module")
def pinocchio_model():
    pin = pytest.importorskip("pinocchio")
    import franky_sim

    model = pin.buildModelFromUrdf(str(Path(franky_sim.__file__).parent / "assets" / "fr3.urdf"))
    return pin, model, model.createData()


@settings(max_examples=30, deadline=None)
@given(SHARES, st.floats(0, 0.04), st.floats(0, 0.04))
def test_every_frame_agrees_with_the_urdf(pinocchio_model, shares, left, right):
    pin, model, data = pinocchio_model
    q = joints(shares)
    pin.framesForwardKinematics(model, data, np.array([*q, left, right]))
    for name, pose in link_poses(q, (left, right)).items():
        np.testing.assert_allclose(pose, data.oMf[model.getFrameId(name)].homogeneous, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(tcp_pose(q), data.oMf[model.getFrameId("fr3_hand_tcp")].homogeneous, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(SHARES)
def test_the_jacobian_is_the_derivative_of_the_pose(shares):
    q = joints(shares)
    for i in range(7):
        step = np.eye(7)[i] * 1e-6
        numeric = pose_error(tcp_pose(q + step), tcp_pose(q - step)) / 2e-6
        np.testing.assert_allclose(jacobian(q)[:, i], numeric, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.05, 0.05), min_size=7, max_size=7))
def test_inverse_kinematics_reaches_what_is_near(offsets):
    q = np.array([0.1, 0.3, -0.1, -2.2, 0.1, 2.5, 0.8])
    goal = tcp_pose(q + np.array(offsets))
    found = solve_ik(goal, q)
    assert found.converged
    np.testing.assert_allclose(tcp_pose(found.q), goal, atol=1e-4)


def test_inverse_kinematics_says_when_a_pose_is_out_of_reach():
    goal = np.eye(4)
    goal[:3, 3] = (2.0, 0.0, 0.5)
    found = solve_ik(goal, np.array([0.0, 0.3, 0.0, -2.2, 0.0, 2.5, 0.8]))
    assert not found.converged
    assert found.translation_error > 0.5
