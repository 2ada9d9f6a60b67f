import time

import numpy as np
import torch

from gsrl_core.deploy.camera import CameraCalibration, Picture
from gsrl_core.deploy.contract import CameraContract, Contract
from gsrl_core.deploy.kinematics import FLANGE_FROM_TCP, solve_ik, tcp_pose
from gsrl_core.deploy.limits import SAFE_Q_MAX, SAFE_Q_MIN
from gsrl_core.deploy.robot import RobotState
from gsrl_core.interfaces import ActionSample

START_Q = np.array([0.0, 0.259, 0.0, -2.289, 0.0, 2.515, 0.7855])


class VirtualClock:
    """Stands in for the module ``time``: only sleeping takes time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds):
        self.now += seconds


def make_contract(**changes):
    base_from_camera = np.eye(4)
    base_from_camera[:3, 3] = (0.1, -0.2, 0.5)
    camera = CameraContract(
        name="3rd_view_camera",
        width=32,
        height=24,
        K=((30.0, 0.0, 16.0), (0.0, 30.0, 12.0), (0.0, 0.0, 1.0)),
        base_from_camera=tuple(map(tuple, base_from_camera.tolist())),
    )
    values = {
        "task": "PutCubeOnPlate-v0",
        "instruction": "pick up the cube and put it on the plate",
        "camera": camera,
        "control_hz": 10,
        "horizon": 4,
        "action_chunk": 4,
        "max_episode_steps": 12,
        "denoise_steps": 2,
        "start_q": tuple(START_Q),
    }
    return Contract(**{**values, **changes})


def make_state(q=START_Q, **changes):
    values = {
        "q": np.array(q, float),
        "dq": np.zeros(7),
        "base_from_tcp": tcp_pose(np.array(q, float)),
        "wrench": np.zeros(6),
        "width": 0.08,
        "stamp": time.monotonic(),
    }
    return RobotState(**{**values, **changes})


class PerfectRobot:
    """Follows every setpoint at once; faults are injected through its attributes."""

    flange_from_tcp = FLANGE_FROM_TCP
    q_range = (SAFE_Q_MIN, SAFE_Q_MAX)

    def __init__(self, q=START_Q):
        self.q = np.array(q, float)
        self.pose = tcp_pose(self.q)
        self.commanded, self.widths, self.calls = [], [], []
        self.wrench = np.zeros(6)
        self.stuck = False
        self.dead_since = None

    def read(self):
        stamp = time.monotonic() if self.dead_since is None else self.dead_since
        return RobotState(self.q.copy(), np.zeros(7), self.pose.copy(), self.wrench, 0.08, stamp, 1.0)

    def begin(self):
        self.calls.append("begin")

    def command(self, setpoint):
        self.commanded.append(setpoint)
        if not self.stuck:
            self.pose = setpoint.pose
            self.q = solve_ik(self.pose, self.q, iterations=4).q

    def grip(self, width):
        self.widths.append(width)

    def stop(self):
        self.calls.append("stop")


class NoisyCamera:
    """A calibrated camera whose pictures differ from each other, as real ones do."""

    def __init__(self, contract, frozen=False):
        self.calibration = CameraCalibration.of(contract.camera)
        self._shape = contract.camera.shape
        self._rng = np.random.default_rng(0)
        self.frozen = frozen

    def read(self):
        rgb = (
            np.zeros(self._shape, np.uint8)
            if self.frozen
            else self._rng.integers(256, size=self._shape, dtype=np.uint8)
        )
        return Picture(rgb, time.monotonic())


class ScriptedClient:
    """Gives the chunks of a function ``request number -> actions``."""

    def __init__(self, chunk, delay=0.0):
        self._chunk = chunk
        self.requests = []
        self.delay = delay
        """What an answer takes, where a test counts time by a VirtualClock [s]."""

    def infer(self, request):
        self.requests.append(request)
        return {"actions": self._chunk(len(self.requests) - 1)}


class MeanColorPolicy:
    """A policy of the Policy protocol whose actions depend on red, blue, state, prompt and noise."""

    horizon = 4
    action_dim = 7

    def act(self, observation, generator, *, explore):
        image = observation.rgb["3rd_view_camera"].float()
        noise = torch.randn(1, self.horizon, self.action_dim, generator=generator)
        value = (
            image[..., 0].mean()
            - 0.5 * image[..., 2].mean()
            + observation.state.sum()
            + len(observation.instruction[0])
        )
        actions = 1e-3 * noise + 1e-4 * value
        return ActionSample(actions, torch.zeros(1), torch.zeros(1), {})
