import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import deploy_examples
import numpy as np
import pytest
from deploy_examples import MeanColorPolicy, NoisyCamera, PerfectRobot, ScriptedClient, VirtualClock, make_contract

from gsrl_core.deploy import loop
from gsrl_core.deploy import robot as robot_module
from gsrl_core.deploy.client import PolicyClient
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.kinematics import tcp_pose
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.deploy.server import PolicyServer
from gsrl_core.deploy.service import PolicyService
from gsrl_core.errors import SafetyError, WorkerError

STEP = [0.01, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
LIMITS = SafetyLimits(watchdog=0.5, max_chunk_age=0.3, max_state_age=0.3)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time of loop, robot and camera, in which the policy takes what the test says, however slow the machine is."""
    clock = VirtualClock()
    for module in (loop, robot_module, deploy_examples):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(loop, "ThreadPoolExecutor", lambda *_, **__: PolicyThread(clock))
    return clock


class PolicyThread(ThreadPoolExecutor):
    """Stands still in the virtual clock while it computes; the answer then comes ``delay`` later."""

    def __init__(self, clock):
        super().__init__(1)
        self._clock = clock

    def submit(self, ask):
        answer = super().submit(ask)
        wait([answer], 60.0)
        client = getattr(ask.__self__, "client", None)
        comes_at = self._clock.now + getattr(client, "delay", 0.0)
        done = answer.done
        answer.done = lambda: done() and self._clock.now >= comes_at
        return answer


def walk(_):
    return np.array([STEP] * 4)


def drive(robot, client, *, limits=LIMITS, camera=None, contract=None, log=None, **options):
    contract = contract or make_contract()
    log = log or EpisodeLog()
    camera = camera or NoisyCamera(contract)
    options = {"permit": lambda: True, "log": log, **options}
    try:
        run_episode(robot, client, Envelope(limits, contract), camera, contract, **options)
    finally:
        assert "begin" not in robot.calls or robot.calls[-1] == "stop"
    return log


def test_an_episode_integrates_the_actions_and_stops():
    robot, client = PerfectRobot(), ScriptedClient(walk)
    log = drive(robot, client, max_steps=6)
    assert log.outcome == "completed"
    assert len(log.steps) == 6
    assert len(client.requests) == 2
    x = [step["target"][0][3] for step in log.steps]
    np.testing.assert_allclose(np.diff(x), 0.01, atol=1e-9)
    assert robot.calls == ["begin", "stop"]
    assert robot.widths == [0.0] * 6
    assert log.summary()["tracking_mm"]["max"] < 1e-3
    request = client.requests[0]
    assert request["observation/image"].shape == (24, 32, 3)
    np.testing.assert_allclose(request["observation/state"][7:], 0.04)
    assert request["prompt"] == "pick up the cube and put it on the plate"


def test_a_dry_run_decides_everything_and_moves_nothing():
    robot = PerfectRobot()
    log = drive(robot, ScriptedClient(walk), max_steps=4, dry_run=True)
    assert log.outcome == "completed"
    assert robot.calls == robot.commanded == robot.widths == []
    assert log.steps[-1]["target"][0][3] == pytest.approx(tcp_pose(robot.q)[0, 3] + 0.04)


@pytest.mark.parametrize(
    ("chunk", "text"),
    [(np.zeros((5, 7)), "shape"), (np.full((4, 7), np.nan), "nan"), (None, "contract says")],
)
def test_a_broken_chunk_stops_the_arm_where_it_is(chunk, text):
    robot = PerfectRobot()
    with pytest.raises(SafetyError, match=text):
        drive(robot, ScriptedClient(lambda _: chunk))
    np.testing.assert_allclose(robot.pose, tcp_pose(np.array(make_contract().start_q)), atol=1e-6)


def test_a_policy_that_hangs_makes_the_arm_hold_and_the_watchdog_stops_it(monkeypatch):
    released = threading.Event()

    class Stuck(ScriptedClient):
        def infer(self, request):
            released.wait(60.0)
            return super().infer(request)

    monkeypatch.setattr(loop, "ThreadPoolExecutor", ThreadPoolExecutor)
    robot = PerfectRobot()
    with pytest.raises(SafetyError, match="watchdog"):
        drive(robot, Stuck(walk))
    released.set()
    # It was held actively, at the streaming rate.
    assert len(robot.commanded) == pytest.approx(LIMITS.watchdog * LIMITS.stream_hz, abs=2)
    assert {tuple(setpoint.position) for setpoint in robot.commanded} == {tuple(robot.commanded[0].position)}


def test_chunks_from_old_pictures_are_dropped_not_executed():
    robot = PerfectRobot()
    log = EpisodeLog()
    with pytest.raises(SafetyError, match="too old"):
        drive(robot, ScriptedClient(walk, delay=0.35), log=log)
    assert log.stale_chunks >= 1
    assert log.steps == []
    assert robot.calls == ["begin", "stop"]


def test_an_external_force_stops_the_arm():
    class Pushed(PerfectRobot):
        def command(self, setpoint):
            super().command(setpoint)
            self.wrench = np.array([0, 0, 40.0 if len(self.commanded) > 30 else 0.0, 0, 0, 0])

    robot = Pushed()
    with pytest.raises(SafetyError, match=r"external force \[N\] was 40"):
        drive(robot, ScriptedClient(walk))
    assert len(robot.commanded) == 30 + LIMITS.force_samples


def test_an_arm_that_does_not_follow_is_stopped():
    robot = PerfectRobot()
    robot.stuck = True
    with pytest.raises(SafetyError, match="tracking error"):
        drive(robot, ScriptedClient(walk))


def test_a_lost_connection_is_noticed_by_the_age_of_the_state():
    robot = PerfectRobot()
    robot.dead_since = -10.0
    with pytest.raises(SafetyError, match="old"):
        drive(robot, ScriptedClient(walk))


def test_releasing_the_dead_man_switch_stops_the_arm():
    robot = PerfectRobot()
    with pytest.raises(SafetyError, match="dead-man"):
        drive(robot, ScriptedClient(walk), permit=lambda: len(robot.commanded) < 25)
    assert len(robot.commanded) == 25


def test_the_hand_gets_nothing_after_the_permit_is_withdrawn():
    robot, log = PerfectRobot(), EpisodeLog()
    with pytest.raises(SafetyError, match="dead-man"):
        drive(robot, ScriptedClient(walk), log=log, permit=lambda: len(log.steps) < 2)
    assert robot.widths == [0.0] * 2


def test_the_hand_gets_nothing_when_the_arm_does_not_take_its_setpoint():
    class Starved(PerfectRobot):
        def command(self, setpoint):
            if self.widths:
                raise SafetyError("stream watchdog")
            super().command(setpoint)

    robot = Starved()
    with pytest.raises(SafetyError, match="stream watchdog"):
        drive(robot, ScriptedClient(walk))
    assert robot.widths == [0.0]


def test_a_permit_that_is_withdrawn_before_the_arm_is_taken_over_ends_the_episode():
    robot = PerfectRobot()
    with pytest.raises(SafetyError, match="dead-man"):
        drive(robot, ScriptedClient(walk), permit=lambda: False)
    assert robot.calls == ["stop"]


def test_an_arm_that_moves_is_not_taken_over():
    class Drifting(PerfectRobot):
        def read(self):
            self.q = self.q + 5e-4  # 0.025 rad/s, read every 20 ms
            return super().read()

    robot = Drifting()
    with pytest.raises(SafetyError, match="the arm moves"):
        drive(robot, ScriptedClient(walk))
    assert robot.calls == ["stop"]


def test_a_speed_signal_that_chatters_is_no_motion():
    class Chattering(PerfectRobot):
        def read(self):
            return replace(super().read(), dq=np.full(7, 0.2))

    assert drive(Chattering(), ScriptedClient(walk), max_steps=1).outcome == "completed"


def test_no_steps_are_no_steps():
    robot = PerfectRobot()
    log = drive(robot, ScriptedClient(walk), max_steps=0)
    assert log.steps == []
    assert {tuple(setpoint.position) for setpoint in robot.commanded} == {tuple(tcp_pose(robot.q)[:3, 3])}


def test_an_episode_ends_at_rest_on_its_last_target():
    robot = PerfectRobot()
    log = drive(robot, ScriptedClient(walk), max_steps=4)
    np.testing.assert_allclose(robot.commanded[-1].linear, 0.0, atol=1e-6)
    np.testing.assert_allclose(robot.pose, log.steps[-1]["target"], atol=1e-6)
    np.testing.assert_allclose(log.final["measured"], log.final["target"], atol=1e-6)
    assert log.start[0][3] == pytest.approx(log.final["target"][0][3] - 0.04)


def test_an_answer_after_the_watchdog_is_not_used(clock):
    robot, client = PerfectRobot(), ScriptedClient(walk, delay=0.3)

    # The stream itself stalls for longer than the watchdog; meanwhile the answer arrives.
    stalled = []

    def permit():
        if len(robot.commanded) == 3 and not stalled:
            stalled.append(True)
            clock.sleep(0.7)
        return True

    log = EpisodeLog()
    with pytest.raises(SafetyError, match="watchdog"):
        drive(robot, client, log=log, permit=permit)
    assert client.requests
    assert log.steps == []


def test_the_reason_to_stop_is_not_hidden_by_trouble_while_stopping():
    class Broken(PerfectRobot):
        def stop(self):
            super().stop()
            raise SafetyError("reflex while stopping")

    log = EpisodeLog()
    with pytest.raises(SafetyError, match="shape") as raised:
        drive(Broken(), ScriptedClient(lambda _: np.zeros((5, 7))), log=log)
    assert raised.value.__notes__ == ["while stopping: reflex while stopping"]
    assert "shape" in log.outcome
    assert "reflex while stopping" in log.outcome
    with pytest.raises(SafetyError, match="reflex while stopping"):
        drive(Broken(), ScriptedClient(walk), max_steps=1)


def test_a_frozen_camera_is_noticed():
    contract = make_contract(max_episode_steps=40)
    with pytest.raises(SafetyError, match="frozen"):
        drive(PerfectRobot(), ScriptedClient(walk), camera=NoisyCamera(contract, frozen=True), contract=contract)


def test_a_server_that_dies_in_mid_episode_gives_a_clean_error_after_a_stop():
    contract = make_contract(max_episode_steps=60)
    server = PolicyServer(PolicyService(MeanColorPolicy(), contract), {}, port=0).__enter__()
    robot = PerfectRobot()
    with PolicyClient(port=server.port, timeout=30.0) as client:
        log = EpisodeLog()

        def permit():
            if len(log.steps) == 7:
                server.shutdown()
            return True

        with pytest.raises(WorkerError, match="policy server"):
            drive(robot, client, limits=SafetyLimits(), contract=contract, log=log, permit=permit)
    assert robot.calls == ["begin", "stop"]
    assert len(log.steps) == 8  # two chunks
    assert "policy server" in log.outcome


def test_another_tcp_or_camera_is_refused_before_anything_moves():
    contract = make_contract()
    robot = PerfectRobot()
    robot.flange_from_tcp = np.eye(4)
    with pytest.raises(SafetyError, match="TCP"):
        drive(robot, ScriptedClient(walk))
    for field, change, text in (
        ("base_from_camera", lambda m: m + np.eye(4)[:, [3]] * 0 + np.outer([0.01, 0, 0, 0], [0, 0, 0, 1]), "10.0 mm"),
        ("K", lambda K: K * 1.05, "intrinsics"),
        ("width", lambda w: w * 2, "64 x 24"),
    ):
        camera = NoisyCamera(contract)
        old = camera.calibration
        values = {**old.__dict__, field: change(getattr(old, field))}
        camera.calibration = type(old)(**values)
        robot = PerfectRobot()
        with pytest.raises(SafetyError, match=text):
            drive(robot, ScriptedClient(walk), camera=camera)
        assert robot.commanded == []


def test_late_setpoints_move_the_schedule_instead_of_bunching_up(clock):
    stamps = []

    class Stalling(PerfectRobot):
        def command(self, setpoint):
            super().command(setpoint)
            stamps.append(clock.now)
            if len(self.commanded) == 15:
                clock.sleep(0.15)

    drive(Stalling(), ScriptedClient(walk), max_steps=4)
    gaps = np.diff(stamps)
    assert gaps.max() == pytest.approx(0.15)
    # Bunched up, the ones that were due in the meantime would follow each other at once.
    assert gaps.min() >= 0.0099
