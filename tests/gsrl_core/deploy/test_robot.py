"""franky against the FR3 control-interface emulator on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from deploy_examples import START_Q, NoisyCamera, ScriptedClient, make_contract
from emulated_time import LEAD

from gsrl_core.deploy import limits as fr3
from gsrl_core.deploy.child import child_environment, running_child
from gsrl_core.deploy.emulator import running_emulator
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.franky_robot import FrankyRobot, _urdf_joint_limits
from gsrl_core.deploy.kinematics import FLANGE_FROM_TCP, pose_error, tcp_pose
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.deploy.robot import wait_at_rest
from gsrl_core.deploy.smooth import Setpoint
from gsrl_core.errors import SafetyError, WorkerError

# What a package demands of an arm. The clock is the emulator's, so that a busy machine cannot fall short of it.
LIMITS = SafetyLimits()
tied = pytest.mark.usefixtures("emulated_time")


def always():
    return True


def unchecked(state):
    pass


@tied
def test_an_episode_on_the_emulator():
    contract = make_contract(max_episode_steps=20)
    step = [0.01, -0.008, 0.006, 0.0, 0.0, 0.03, -1.0]
    client = ScriptedClient(lambda i: np.array([step if i < 3 else [0.0] * 6 + [-1.0]] * 4))
    with running_emulator(contract.start_q) as host, FrankyRobot(host, LIMITS, realtime=False) as robot:
        np.testing.assert_allclose(robot.flange_from_tcp, FLANGE_FROM_TCP, atol=1e-6)
        assert (robot.q_range[0] >= fr3.SAFE_Q_MIN).all()
        start = robot.read()
        np.testing.assert_allclose(start.base_from_tcp, tcp_pose(start.q), atol=1e-4)
        np.testing.assert_allclose(start.q, START_Q, atol=1e-2)
        assert start.width == pytest.approx(0.08, abs=2e-3)
        log = EpisodeLog()
        envelope = Envelope(LIMITS, contract, robot.q_range)
        run_episode(robot, client, envelope, NoisyCamera(contract), contract, log=log, permit=always)
        end = robot.read()
        assert log.outcome == "completed"
        # Ten setpoints a step, each up to LEAD late; a chunk's first step waits for the chunk besides.
        times = np.reshape([step["time"] for step in log.steps], (-1, contract.action_chunk))
        assert (np.diff(times) > 0.1 - LEAD / 1000).all()
        assert (np.diff(times) < 0.1 + 10 * LEAD / 1000).all()
        target = np.array(log.steps[-1]["target"])
        # 12 steps: the arm follows the integral of the actions, within what an impedance controller leaves.
        np.testing.assert_allclose(target[:3, 3] - start.base_from_tcp[:3, 3], 12 * np.array(step[:3]), atol=1e-6)
        error = pose_error(target, end.base_from_tcp)
        assert np.linalg.norm(error[:3]) < 0.015
        assert np.linalg.norm(error[3:]) < 0.08
        assert end.width < 0.03
        # The hand's answer and a second stop must not hurt.
        robot.stop()
        with pytest.raises(SafetyError, match="begin"):
            robot.command(None)
        with pytest.raises(SafetyError, match="outside the joint range"):
            robot.move_to(np.full(7, 3.0), check=unchecked)
        robot.move_to(START_Q, check=unchecked)
        np.testing.assert_allclose(robot.read().q, START_Q, atol=0.02)
    with pytest.raises(SafetyError, match="enabled in Desk"):
        FrankyRobot(host, LIMITS, realtime=False)


@tied
def test_the_move_to_the_start_pose_obeys_monitors_and_dead_man():
    goal = START_Q + np.array([0.5, 0, 0, 0, 0, 0, 0])
    seen = []

    def check(state):
        seen.append(state.q[0])
        if state.q[0] > 0.05:
            raise SafetyError("released")

    with running_emulator(START_Q) as host, FrankyRobot(host, LIMITS, realtime=False) as robot:
        with pytest.raises(SafetyError, match="refused at once"):
            robot.move_to(goal, check=refuse)
        assert robot.read().q[0] == pytest.approx(0.0, abs=1e-3)
        with pytest.raises(SafetyError, match="released"):
            robot.move_to(goal, check=check)
        stood = wait_at_rest(robot.read).q[0]
        assert 0.05 < stood < 0.3
        # The arm is free for the next motion.
        robot.move_to(START_Q, check=unchecked)


@tied
def test_a_check_that_hangs_on_the_way_to_the_start_pose_does_not_keep_the_arm_moving():
    goal = START_Q + np.array([0.8, 0, 0, 0, 0, 0, 0])
    moving = []

    def check(state):
        if state.q[0] > 0.05 and not moving:
            moving.append(robot._robot.is_in_control)
            until(lambda: not robot._robot.is_in_control)
            moving.append(robot._robot.is_in_control)

    with running_emulator(START_Q) as host, FrankyRobot(host, LIMITS, realtime=False) as robot:
        with pytest.raises(SafetyError, match=r"no check of its state for 0\.25 s .* the watchdog stopped the arm"):
            robot.move_to(goal, check=check)
        assert moving == [True, False]
        assert wait_at_rest(robot.read).q[0] < 0.5
        # The arm is free for the next motion.
        robot.move_to(START_Q, check=unchecked)


@tied
def test_stopping_withdraws_the_wish_to_the_hand():
    with running_emulator(START_Q) as host, FrankyRobot(host, LIMITS, realtime=False) as robot:
        sent = []
        move = robot._hand._gripper.move_async
        robot._hand._gripper = Recorded(robot._hand._gripper, move_async=lambda *to: (sent.append(to[0]), move(*to))[1])
        robot.grip(0.0)
        until(lambda: robot.read().width < 0.075)
        # In one piece, so that the fingers cannot arrive, and the wish be sent, in between.
        with robot._hand._lock:
            robot.grip(0.08)
            robot.stop()
        # Where the fingers stand then is libfranka's affair: it often sends a stop only when the command has ended.
        until(lambda: robot._hand._future is None)
        for _ in range(10):
            time.sleep(0.05)
            assert robot.read().width < 0.076
        assert not sent
        robot.grip(0.08)
        until(lambda: robot.read().width > 0.078)
        assert sent == [0.08]


class Recorded:
    """An object with some of its methods replaced."""

    def __init__(self, of, **methods):
        self._of = of
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self._of, name)


def until(condition):
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refuse(state):
    raise SafetyError("refused at once")


@tied
def test_a_stream_that_ends_stops_the_arm_by_itself():
    with running_emulator(START_Q) as host, FrankyRobot(host, LIMITS, realtime=False) as robot:
        wait_at_rest(robot.read)
        robot.begin()
        pose = robot.read().base_from_tcp
        setpoint = Setpoint.at_rest(pose)
        for _ in range(5):  # seldom, but often enough
            robot.command(setpoint)
            time.sleep(0.8 * LIMITS.stream_timeout)
        robot.command(setpoint)
        ended = time.monotonic()
        assert robot.read().success_rate is not None
        until(lambda: not robot._robot.is_in_control)
        assert time.monotonic() - ended > LIMITS.stream_timeout
        for late in (lambda: robot.command(setpoint), lambda: robot.grip(0.0)):
            with pytest.raises(
                SafetyError, match=r"no setpoint for 0\.\d\d s \(limit 0\.25 s\): the stream watchdog stop"
            ):
                late()
        robot.stop()


def test_a_state_that_does_not_advance_grows_old():
    with running_emulator(START_Q) as host, FrankyRobot(host, LIMITS, realtime=False) as robot:
        first = robot.read().stamp
        until(lambda: robot.read().stamp > first)
        robot._robot = Recorded(robot._robot, state=robot._robot.state)
        last = robot.read().stamp
        time.sleep(0.05)
        assert robot.read().stamp == last


def test_errors_of_franky_name_robot_and_action(monkeypatch):
    import franky

    def refuse_tracker(*_, **__):
        raise franky.CommandException("libfranka: command rejected")

    with running_emulator(START_Q) as host:
        robot = FrankyRobot(host, LIMITS, realtime=False)
        monkeypatch.setattr(franky, "CartesianImpedanceTracker", refuse_tracker)
        with pytest.raises(SafetyError, match=rf"robot {host}: refused to follow .*command rejected"):
            robot.begin()
        # What goes wrong on leaving is a note of the reason to leave.
        monkeypatch.setattr(robot, "stop", lambda: refuse(None))
        with pytest.raises(ValueError, match="the reason") as raised, robot:
            raise ValueError("the reason")
        assert raised.value.__notes__ == ["while closing: refused at once"]


def test_leaving_while_the_hand_is_busy_does_not_crash():
    # In a process of its own: the failure would be a segmentation fault, seen once the hand is freed under its thread.
    code = (
        "import gc, time\n"
        "from gsrl_core.deploy.emulator import running_emulator\n"
        "from gsrl_core.deploy.limits import SafetyLimits\n"
        "limits = SafetyLimits().model_copy(update={'max_state_age': 10.0})\n"
        "from gsrl_core.deploy.franky_robot import FrankyRobot\n"
        "with running_emulator([0, 0.259, 0, -2.289, 0, 2.515, 0.7855], 0.08) as host:\n"
        "    for _ in range(2):\n"
        "        with FrankyRobot(host, limits, realtime=False) as robot:\n"
        "            robot.grip(0.0); time.sleep(0.3)\n"
        "        del robot; gc.collect()\n"
        "    robot = FrankyRobot(host, limits, realtime=False)\n"
        "    robot.grip(0.08)\n"
        "robot.close()\n"
        "del robot; gc.collect()\n"
        "print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alive"


@tied
def test_an_emulator_that_dies_in_mid_episode_ends_in_a_clear_error():
    contract = make_contract(max_episode_steps=200)
    client = ScriptedClient(lambda _: np.array([[0.0] * 7] * 4))
    log = EpisodeLog()
    with running_child(
        "gsrl_core.deploy.emulator", ["--q", str(START_Q.tolist()), "--width", "0.08"], timeout=60
    ) as it:
        killed = []

        def permit():
            if len(log.steps) == 3 and not killed:
                os.kill(it["pid"], signal.SIGKILL)
                killed.append(time.monotonic())
            return True

        robot = FrankyRobot(it["host"], LIMITS, realtime=False)
        with pytest.raises(SafetyError, match=it["host"]):
            run_episode(
                robot, client, Envelope(LIMITS, contract), NoisyCamera(contract), contract, log=log, permit=permit
            )
        robot.close()
    # A state may be 0.1 s old, which is one step; libfranka may see first that the connection is gone.
    assert 3 <= len(log.steps) <= 5
    assert time.monotonic() - killed[0] < 15
    assert "left control" in log.outcome or "old" in log.outcome or "no state" in log.outcome


def test_a_child_ends_when_its_parent_is_killed():
    code = (
        "import sys, time\n"
        "from gsrl_core.deploy.emulator import running_emulator\n"
        "with running_emulator([0, 0.259, 0, -2.289, 0, 2.515, 0.7855]) as host:\n"
        "    print(host, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=child_environment())
    host = parent.stdout.readline().strip()
    socket.create_connection((host, 1337), timeout=30).close()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, 1337), timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the emulator outlived its parent")


def test_a_child_that_fails_says_why():
    with (
        pytest.raises(WorkerError, match=r"ended with code 1.*No module named"),
        running_child("gsrl_core.deploy.no_such_module", [], timeout=30),
    ):
        pass


def test_joint_limits_are_read_from_the_robots_own_urdf():
    urdf = "<robot><joint type='fixed'/>" + "".join(
        f"<joint type='revolute'><limit lower='{-i}' upper='{i}'/></joint>" for i in range(1, 8)
    )
    low, high = _urdf_joint_limits(urdf + "</robot>")
    np.testing.assert_array_equal(high, np.arange(1, 8))
    np.testing.assert_array_equal(low, -np.arange(1, 8))
