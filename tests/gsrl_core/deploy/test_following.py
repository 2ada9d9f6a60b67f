"""Verification must fail where it matters: an arm that does not do what the targets ask."""

import numpy as np
import pytest
from deploy_examples import NoisyCamera, PerfectRobot, ScriptedClient, make_contract

from gsrl_core.deploy.emulator import relaxed
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.errors import PackageError
from gsrl_core.package_check import check_following


def test_negative_control_an_arm_that_stands_still_fails_the_check():
    contract, limits = make_contract(max_episode_steps=8), relaxed(SafetyLimits())
    client = ScriptedClient(lambda _: np.array([[0.005, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]] * 4))
    for stuck in (False, True):
        robot, log = PerfectRobot(), EpisodeLog()
        robot.stuck = stuck
        camera = NoisyCamera(contract)
        run_episode(robot, client, Envelope(limits, contract), camera, contract, log=log, permit=lambda: True)
        assert log.outcome == "completed"  # no monitor notices 40 mm
        if stuck:
            with pytest.raises(PackageError, match="did not follow"):
                check_following(log)
        else:
            assert check_following(log)["final_mm"] < 1e-3
