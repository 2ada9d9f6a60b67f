"""The envelope's promises, judged by a checker that shares no code with it: finite differences and pinocchio."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from deploy_examples import START_Q, make_contract, make_state
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from gsrl_core.deploy.contract import ActionContract
from gsrl_core.deploy.envelope import Envelope, check_chunk, clamp_step, integrate
from gsrl_core.deploy.kinematics import solve_ik, tcp_pose
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.smooth import Setpoint, plan_to
from gsrl_core.errors import SafetyError

LIMITS = SafetyLimits()
# Franka's documentation, written down a second time: the rectangular set.
Q_LOW = np.array([-2.3476, -1.5454, -2.4937, -2.7714, -2.5100, 0.7773, -2.7045])
Q_HIGH = np.array([2.3476, 1.5454, 2.4937, -0.4226, 2.5100, 4.2841, 2.7045])
DQ_HIGH = np.array([2.0, 1.0, 1.5, 1.25, 3.0, 1.5, 3.0])


def finger_boxes(body):
    """(origin, rpy, size) of the collision boxes of a finger, read from the URDF."""
    import franky_sim

    root = ElementTree.parse(Path(franky_sim.__file__).parent / "assets" / "fr3.urdf").getroot()
    for collision in root.find(f"link[@name='{body}']").iter("collision"):
        origin = collision.find("origin")
        size = collision.find("geometry/box").get("size")
        yield tuple(np.array(text.split(), float) for text in (origin.get("xyz"), origin.get("rpy"), size))


class Checker:
    """Flags what a stream of TCP poses at 100 Hz does beyond the limits."""

    def __init__(self, q=START_Q):
        import franky_sim
        import pinocchio as pin

        self.pin = pin
        self.model = pin.buildModelFromUrdf(str(Path(franky_sim.__file__).parent / "assets" / "fr3.urdf"))
        self.data = self.model.createData()
        self.frame = self.model.getFrameId("fr3_hand_tcp")
        self.q = np.array([*q, 0.04, 0.04])

    def joints(self, poses):
        path = []
        for pose in poses:
            goal = self.pin.SE3(pose[:3, :3], pose[:3, 3])
            for _ in range(4):
                self.pin.framesForwardKinematics(self.model, self.data, self.q)
                error = self.pin.log6(self.data.oMf[self.frame].actInv(goal)).vector
                J = self.pin.computeFrameJacobian(self.model, self.data, self.q, self.frame)[:, :7]
                self.q[:7] += np.linalg.lstsq(J, error, rcond=1e-6)[0]
            path.append(self.q[:7].copy())
        return np.array(path)

    def lowest(self, poses):
        """Height of the lowest corner of the URDF's finger boxes, fingers open, at each TCP pose."""
        pin = self.pin
        pin.framesForwardKinematics(self.model, self.data, np.array([*START_Q, 0.04, 0.04]))
        tcp = self.data.oMf[self.frame].homogeneous
        corners = []
        for body in ("fr3_leftfinger", "fr3_rightfinger"):
            tcp_from_finger = np.linalg.inv(tcp) @ self.data.oMf[self.model.getFrameId(body)].homogeneous
            for origin, turn, size in finger_boxes(body):
                box = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * size / 2
                points = Rotation.from_euler("xyz", turn).apply(box) + origin
                corners.append(np.c_[points, np.ones(8)] @ tcp_from_finger.T)
        return (np.concatenate(corners) @ np.swapaxes(poses, 1, 2))[..., 2].min(axis=1)

    def violations(self, poses, *, dt=0.01, joints=True):
        poses = np.array(poses)
        found = []
        if not np.isfinite(poses).all():
            return ["not finite"]
        p = poses[:, :3, 3]
        if (p < np.array(LIMITS.workspace_min) - 1e-6).any() or (p > np.array(LIMITS.workspace_max) + 1e-6).any():
            found.append("workspace")
        orders = (LIMITS.max_speed, "speed"), (LIMITS.max_acceleration, "acceleration"), (LIMITS.max_jerk, "jerk")
        for order, (limit, name) in enumerate(orders, 1):
            value = np.linalg.norm(np.diff(p, order, axis=0), axis=1).max(initial=0.0) / dt**order
            if value > limit * (1 + 1e-6):
                found.append(f"{name} {value:.3f}")
        turns = Rotation.from_matrix(poses[1:, :3, :3]) * Rotation.from_matrix(poses[:-1, :3, :3]).inv()
        rate = turns.as_rotvec() / dt
        if np.linalg.norm(rate, axis=1).max(initial=0.0) > LIMITS.max_turn_rate * (1 + 1e-3):
            found.append("turn rate")
        if np.linalg.norm(np.diff(rate, axis=0), axis=1).max(initial=0.0) / dt > LIMITS.max_turn_acceleration:
            found.append("turn acceleration")
        if np.linalg.norm(np.diff(rate, 2, axis=0), axis=1).max(initial=0.0) / dt**2 > LIMITS.max_turn_jerk:
            found.append("turn jerk")
        if (self.lowest(poses) < LIMITS.workspace_min[2] - 1e-3).any():
            found.append("table")
        if joints and not found:
            q = self.joints(poses)
            if (q < Q_LOW).any() or (q > Q_HIGH).any():
                found.append("joint position")
            if (np.abs(np.diff(q, axis=0)) / dt > DQ_HIGH * 1.02).any():
                found.append("joint velocity")
        return found


def drive(actions, limits=LIMITS, q=START_Q):
    """All poses that the envelope streams for ``actions`` when the arm follows perfectly, and its decisions."""
    envelope = Envelope(limits, make_contract())
    envelope.start(make_state(q))
    poses, decisions, measured = [tcp_pose(q)], [], np.array(q)
    for action in actions:
        decision = envelope.step(np.array(action, float), make_state(measured))
        measured = solve_ik(decision.setpoints[-1].pose, measured).q
        poses += [setpoint.pose for setpoint in decision.setpoints]
        decisions.append(decision)
    for _ in range(120):  # a turn at the limit of its jerk takes 0.6 s
        poses.append(envelope.hold().pose)
    return poses, decisions


def number(limit):
    return st.floats(-limit, limit, allow_nan=False)


SMALL = st.tuples(*[number(0.05)] * 3, *[number(0.14)] * 3, number(1.0))
# The largest that check_chunk lets through: half as much again as the contract's bound.
WILD = st.tuples(*[number(0.15)] * 6, number(1e6))
# The same push again and again is what reaches walls and joint limits.
PUSH = st.tuples(SMALL | WILD, st.integers(1, 12)).map(lambda pair: [pair[0]] * pair[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(PUSH, min_size=1, max_size=3))
def test_whatever_the_policy_says_the_stream_stays_within_all_limits(pushes):
    actions = [action for push in pushes for action in push]
    for action in actions:
        check_chunk([action] * 4, make_contract())
    poses, decisions = drive(actions)
    assert Checker().violations(poses) == []
    previous = tcp_pose(START_Q)
    for decision in decisions:
        assert np.linalg.norm(decision.target[:3, 3] - previous[:3, 3]) <= LIMITS.max_step_translation + 1e-9
        angle = (
            Rotation.from_matrix(decision.target[:3, :3]) * Rotation.from_matrix(previous[:3, :3]).inv()
        ).magnitude()
        assert angle <= LIMITS.max_step_rotation + 1e-9
        assert 0.0 <= decision.width <= 0.08
        previous = decision.target
    # The stream ends at rest on the last target.
    np.testing.assert_allclose(poses[-1], decisions[-1].target, atol=1e-6)
    np.testing.assert_allclose(poses[-1], poses[-2], atol=1e-9)


def test_negative_control_the_checker_flags_what_the_envelope_prevents():
    start = tcp_pose(START_Q)
    # Envelope off: a policy that asks for 50 mm a step, streamed raw at 10 Hz and interpolated at 100 Hz.
    raw = [_moved(start, (0, 0.05 * (k // 10), 0)) for k in range(30)]
    assert any("speed" in text for text in Checker().violations(raw))
    interpolated = [_moved(start, (0, 0.005 * k, 0)) for k in range(30)]
    assert any("speed" in text for text in Checker().violations(interpolated))
    assert "workspace" in Checker().violations([start, _moved(start, (0, 0, -0.2))])
    spun = start.copy()
    spun[:3, :3] = Rotation.from_rotvec([0, 0, 0.3]).as_matrix() @ spun[:3, :3]
    assert "turn rate" in Checker().violations([start, spun])
    # Full acceleration at once: speed and acceleration are legal, the jerk is not.
    jump = [_moved(start, (0, 0.5 * 4.0 * (0.01 * k) ** 2, 0)) for k in [0, 0, 0, *range(8)]]
    assert [text.split()[0] for text in Checker().violations(jump)] == ["jerk"]
    # A vertical hand with the TCP 5 mm above the table has its finger tips 4.5 mm below the plane.
    low = vertical(0.005)
    assert Checker().lowest(np.array([low]))[0] == pytest.approx(-0.0045, abs=1e-9)
    assert Checker().violations([low]) == ["table"]
    # Joint 7 turned slowly past its limit: only the joints are wrong.
    path = START_Q + np.outer(np.linspace(0, 2.2, 250), np.eye(7)[6])
    assert Checker().violations([tcp_pose(q) for q in path]) == ["joint position"]


def vertical(z, tilt=0.0):
    """The hand pointing down, tilted about the base's x axis (rad), TCP at height ``z``."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("x", np.pi + tilt).as_matrix()
    pose[:3, 3] = (0.45, 0.0, z)
    return pose


def _moved(pose, offset):
    pose = pose.copy()
    pose[:3, 3] += offset
    return pose


def test_a_step_within_the_limits_passes_unchanged():
    action = [0.01, -0.005, 0.004, 0.02, -0.01, 0.03, 1.0]
    _, (decision,) = drive([action])
    assert decision.events == ()
    expected = tcp_pose(START_Q)
    np.testing.assert_allclose(decision.target[:3, 3], expected[:3, 3] + action[:3], atol=1e-12)
    cx, cy, cz = np.cos(action[3:6])
    sx, sy, sz = np.sin(action[3:6])
    Rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    Ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    Rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    np.testing.assert_allclose(decision.target[:3, :3], Rx @ Ry @ Rz @ expected[:3, :3], atol=1e-12)
    assert decision.width == pytest.approx(0.08)


def test_targets_follow_maniskill_for_the_same_actions():
    torch = pytest.importorskip("torch")
    rotations = pytest.importorskip("mani_skill.utils.geometry.rotation_conversions")
    rng = np.random.default_rng(0)
    pose = tcp_pose(START_Q)
    theirs_p, theirs_q = torch.tensor(pose[:3, 3]), rotations.matrix_to_quaternion(torch.tensor(pose[:3, :3]))
    for _ in range(10):
        action = rng.uniform(-0.08, 0.08, 6)
        pose = integrate(pose, action[:3], Rotation.from_euler("XYZ", action[3:6]))
        # mani_skill/agents/controllers/pd_ee_pose.py, root_translation:root_aligned_body_rotation
        turn = rotations.matrix_to_quaternion(rotations.euler_angles_to_matrix(torch.tensor(action[3:6]), "XYZ"))
        theirs_p, theirs_q = theirs_p + torch.tensor(action[:3]), rotations.quaternion_multiply(turn, theirs_q)
    np.testing.assert_allclose(pose[:3, 3], theirs_p.numpy(), atol=1e-9)
    np.testing.assert_allclose(pose[:3, :3], rotations.quaternion_to_matrix(theirs_q).numpy(), atol=1e-9)


def test_delta_integrates_on_the_last_target_not_on_the_measured_pose():
    envelope = Envelope(LIMITS, make_contract())
    envelope.start(make_state())
    for _ in range(3):
        decision = envelope.step(np.array([0.01, 0, 0, 0, 0, 0, 0.0]), make_state())
    assert decision.target[0, 3] == pytest.approx(tcp_pose(START_Q)[0, 3] + 0.03)


def test_clamps_keep_the_direction_and_say_their_name():
    translation, turn, events = clamp_step(np.array([0.3, 0.0, -0.4, 0.0, 0.0, 1.0, 0.0]), LIMITS)
    np.testing.assert_allclose(translation, [0.012, 0.0, -0.016])
    np.testing.assert_allclose(turn.as_rotvec(), [0.0, 0.0, 0.1])
    assert events == ("translation_clamped", "rotation_clamped")


def over_the_table(tilt=0.0, z=0.08):
    """Joint positions with the hand pointing down, close over the table."""
    found = solve_ik(vertical(z, tilt), START_Q, iterations=200)
    assert found.converged
    return found.q


@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.2])
def test_the_fingers_never_reach_the_table(tilt):
    poses, decisions = drive([[0, 0, -0.1, 0, 0, 0, -1.0]] * 12, q=over_the_table(tilt))
    heights = Checker().lowest(np.array(poses))
    assert heights.min() >= LIMITS.workspace_min[2] - 1e-6
    assert heights[-1] == pytest.approx(LIMITS.workspace_min[2], abs=1e-4)
    assert "workspace" in decisions[-1].events
    # 5 mm clearance + 9.5 mm from TCP to tip when vertical; a tilt of 0.2 rad costs about (40 + 15) mm * sin 0.2 more.
    assert poses[-1][2, 3] == pytest.approx(0.0145 if tilt == 0 else 0.0145 + 0.055 * np.sin(0.2), abs=1e-3)


@pytest.mark.parametrize("axis", [3, 4])
def test_a_turn_near_the_table_lifts_the_hand_or_is_reduced(axis):
    down = [[0, 0, -0.02, 0, 0, 0, 1.0]] * 5
    turn = [0.0] * 7
    turn[axis] = 0.1
    poses, decisions = drive([*down, *[turn] * 6], q=over_the_table())
    assert Checker().lowest(np.array(poses)).min() >= LIMITS.workspace_min[2] - 1e-3
    assert {"workspace", "table"} & set(decisions[-1].events)
    assert poses[-1][2, 3] > 0.0145


def test_a_cube_on_the_table_can_be_grasped():
    # 40 mm cube: its centre is 20 mm above the table, where the task's expert puts the TCP.
    q = over_the_table(z=0.08)
    poses, decisions = drive([[0, 0, -0.02, 0, 0, 0, 1.0]] * 3 + [[0, 0, 0, 0, 0, 0, -0.5]], q=q)
    assert [decision.events for decision in decisions] == [()] * 4
    assert poses[-1][2, 3] == pytest.approx(0.02, abs=1e-5)
    assert decisions[-1].width == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("row", "column", "value", "text"), [(1, 0, 1e6, r"1e\+06 m in step 1"), (2, 5, -0.16, r"-0\.16 rad in step 2")]
)
def test_an_absurd_chunk_is_refused_not_walked_on(row, column, value, text):
    chunk = np.zeros((4, 7))
    chunk[row, column] = value
    with pytest.raises(SafetyError, match=text):
        check_chunk(chunk, make_contract())
    # The bound is the contract's, a little more is noise, and the gripper saturates.
    chunk[row, column] = 0.14
    chunk[0, 6] = 40.0
    check_chunk(chunk, make_contract())
    with pytest.raises(SafetyError, match=r"never exceeds 0\.05"):
        check_chunk(chunk, make_contract(action=ActionContract(bound=0.05)))


def test_a_preview_that_is_refused_even_at_rest_stops_the_arm():
    envelope = Envelope(LIMITS, make_contract())
    envelope.start(make_state())
    # As after a push: the joints that hold this pose lie outside their range by more than braking may use.
    envelope._q_max = START_Q - 0.05
    with pytest.raises(SafetyError, match=r"leave its limits \(joints\) even if it only braked"):
        envelope.step(np.zeros(7), make_state())


def test_a_pose_that_no_joints_reach_stops_the_arm():
    envelope = Envelope(LIMITS, make_contract())
    envelope.start(make_state())
    envelope.setpoint = Setpoint.at_rest(_moved(tcp_pose(START_Q), (0.6, 0, 0)))
    with pytest.raises(SafetyError, match="no joint positions near"):
        envelope.step(np.zeros(7), make_state())


def test_joint_limits_stop_a_motion_that_the_workspace_would_allow():
    _, decisions = drive([[0, 0, 0, 0.0, 0.1, 0.0, 0.0]] * 40)
    assert "joints" in decisions[-1].events
    assert decisions[-1].target == pytest.approx(decisions[-2].target, abs=0.03)


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (np.zeros((5, 7)), "shape"),
        (np.zeros((4, 8)), "shape"),
        (np.zeros(7), "shape"),
        (None, "shape|numbers"),
        ("actions", "numbers"),
        (np.full((4, 7), np.nan), "nan"),
        (np.array([[0.0] * 7] * 3 + [[0, 0, 0, 0, 0, np.inf, 0]]), "step 3, column 5"),
    ],
)
def test_broken_chunks_are_refused_whole(chunk, text):
    with pytest.raises(SafetyError, match=text):
        check_chunk(chunk, make_contract())


def test_chunk_age():
    envelope = Envelope(SafetyLimits(max_chunk_age=0.5), make_contract())
    assert not envelope.is_stale(10.0, 10.4)
    assert envelope.is_stale(10.0, 10.6)
    assert envelope.is_stale(10.0, 9.9)  # a clock that runs backwards is no evidence of freshness
    assert envelope.is_stale(float("nan"), 10.0)


def test_start_is_refused_outside_the_envelope():
    envelope = Envelope(LIMITS, make_contract())
    with pytest.raises(SafetyError, match="workspace"):
        envelope.start(make_state(base_from_tcp=_moved(tcp_pose(START_Q), (0.4, 0, 0))))
    with pytest.raises(SafetyError, match="not finite"):
        envelope.start(make_state(wrench=np.full(6, np.nan)))
    with pytest.raises(SafetyError, match=r"lowest point of the hand at z = -0\.00"):
        envelope.start(make_state(over_the_table(z=0.03), base_from_tcp=vertical(0.008)))
    with pytest.raises(SafetyError, match="joint 7"):
        envelope.start(make_state(START_Q + np.array([0, 0, 0, 0, 0, 0, 2.2])))
    with pytest.raises(SafetyError, match="TCP"):
        envelope.start(make_state(base_from_tcp=_moved(tcp_pose(START_Q), (0.02, 0, 0))))


def test_force_trips_after_consecutive_samples_only():
    envelope = Envelope(SafetyLimits(max_force=20.0, force_samples=4), make_contract())
    pushed = np.array([0.0, 15.0, 15.0, 0, 0, 0])
    setpoint = Setpoint.at_rest(tcp_pose(START_Q))
    for wrench in [pushed] * 3 + [np.zeros(6)] + [pushed] * 3:
        state = make_state(wrench=wrench)
        envelope.monitor(state, setpoint, state.stamp)
    with pytest.raises(SafetyError, match=r"external force .* was 21\.213, above 20, in 4 consecutive"):
        envelope.monitor(make_state(wrench=pushed), setpoint, 0.0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"wrench": np.full(6, np.nan)}, "external force"),
        ({"base_from_tcp": _moved(tcp_pose(START_Q), (0.07, 0, 0))}, r"tracking error \[m\]"),
        ({"success_rate": 0.5}, "lost control packets"),
    ],
)
def test_monitors(changes, text):
    envelope = Envelope(LIMITS, make_contract())
    with pytest.raises(SafetyError, match=text):
        for _ in range(LIMITS.force_samples):
            envelope.monitor(make_state(**changes), Setpoint.at_rest(tcp_pose(START_Q)), 0.0)


def test_an_old_state_stops_at_once():
    envelope = Envelope(LIMITS, make_contract())
    with pytest.raises(SafetyError, match="old"):
        envelope.monitor(make_state(stamp=10.0), None, 10.0 + LIMITS.max_state_age + 0.01)


def test_a_stream_rate_that_does_not_divide_is_refused():
    with pytest.raises(SafetyError, match="multiple"):
        Envelope(LIMITS, make_contract(control_hz=15))


@settings(max_examples=40, deadline=None)
@given(st.lists(number(0.1), min_size=3, max_size=3), st.lists(number(0.4), min_size=3, max_size=3))
def test_plans_end_at_rest_on_their_target_and_report_their_true_velocity(offset, turn):
    start = Setpoint.at_rest(tcp_pose(START_Q))
    goal = integrate(start.pose, np.array(offset), Rotation.from_rotvec(turn))
    plan = plan_to(start, goal, LIMITS)
    end = plan.at(plan.duration + 1.0)
    np.testing.assert_allclose(end.pose, goal, atol=1e-6)
    np.testing.assert_allclose([*end.linear, *end.angular], 0.0, atol=1e-6)
    middle, h = plan.duration / 2, 1e-5
    before, now, after = plan.at(middle - h), plan.at(middle), plan.at(middle + h)
    np.testing.assert_allclose(now.linear, (after.position - before.position) / (2 * h), atol=1e-3)
    spin = (Rotation.from_matrix(after.rotation) * Rotation.from_matrix(before.rotation).inv()).as_rotvec()
    np.testing.assert_allclose(now.angular, spin / (2 * h), atol=1e-3)
    np.testing.assert_allclose(now.angular_acceleration, (after.angular - before.angular) / (2 * h), atol=2e-2)
