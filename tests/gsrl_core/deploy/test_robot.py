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

from gsrl_core.deploy import limits as fr3
from gsrl_core.deploy.child import child_environment, running_child
from gsrl_core.deploy.emulator import running_emulator
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.kinematics import FLANGE_FROM_TCP, pose_error, tcp_pose
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.deploy.robot import FrankyRobot, _urdf_joint_limits
from gsrl_core.errors import SafetyError, WorkerError

# The emulator shares two busy cores with everything else here.
LIMITS = SafetyLimits(max_state_age=1.0, max_tracking_error=0.1)


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
        run_episode(robot, client, Envelope(LIMITS, contract, robot.q_range), NoisyCamera(contract), contract, log=log)
        end = robot.read()
        assert log.outcome == "completed"
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
            robot.move_to(np.full(7, 3.0))
        robot.move_to(START_Q)
        np.testing.assert_allclose(robot.read().q, START_Q, atol=0.02)
    with pytest.raises(SafetyError, match="enabled in Desk"):
        FrankyRobot(host, LIMITS, realtime=False)


def test_leaving_while_the_hand_is_busy_does_not_crash():
    # In a process of its own: the failure would be a segmentation fault, seen once the hand is freed under its thread.
    code = (
        "import sys, gc\n"
        "from gsrl_core.deploy.emulator import running_emulator\n"
        "from gsrl_core.deploy.limits import SafetyLimits\n"
        "from gsrl_core.deploy.robot import FrankyRobot\n"
        "with running_emulator([0, 0.259, 0, -2.289, 0, 2.515, 0.7855], 0.08) as host:\n"
        "    for _ in range(2):\n"
        "        with FrankyRobot(host, SafetyLimits(), realtime=False) as robot:\n"
        "            robot.grip(0.0)\n"
        "        del robot; gc.collect()\n"
        "    robot = FrankyRobot(host, SafetyLimits(), realtime=False)\n"
        "    robot.grip(0.08)\n"
        "robot.close()\n"
        "del robot; gc.collect()\n"
        "print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alive"


def test_an_emulator_that_dies_in_mid_episode_ends_in_a_clear_error():
    contract = make_contract(max_episode_steps=200)
    client = ScriptedClient(lambda _: np.array([[0.0] * 7] * 4))
    log = EpisodeLog()
    with running_child(
        "gsrl_core.deploy.emulator", ["--q", str(START_Q.tolist()), "--width", "0.08"], timeout=60
    ) as it:

        def permit():
            if len(log.steps) == 3:
                os.kill(it["pid"], signal.SIGKILL)
            return True

        robot = FrankyRobot(it["host"], LIMITS, realtime=False)
        started = time.monotonic()
        with pytest.raises(SafetyError, match=it["host"]):
            run_episode(
                robot, client, Envelope(LIMITS, contract), NoisyCamera(contract), contract, log=log, permit=permit
            )
        robot.close()
    assert time.monotonic() - started < 15
    assert 3 <= len(log.steps) < 40
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
    socket.create_connection((host, 1337), timeout=5).close()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
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
