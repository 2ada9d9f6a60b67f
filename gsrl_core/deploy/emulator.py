"""The FR3 control-interface emulator (franky-sim, MuJoCo physics) as a child process.

It listens on a free loopback address of its own (127.x.y.z, ports 1337 and 1338), so several can run side by side. It
checks no limits and models no external force: it shows that client, protocol and motion work, not that they are safe.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gsrl_core.deploy.child import announce, end_with_parent, running_child
from gsrl_core.deploy.limits import SafetyLimits

STATE_AGE = 1.0
"""State age that stops an episode on the emulator [s]; it shares the processor with everything else."""
STREAM_TIMEOUT = 1.0
"""Likewise, of the stream watchdog [s]."""
CHUNK_AGE, WATCHDOG = 3.0, 10.0
"""Likewise, of a chunk that is still used and of the wait for one [s]."""
MIN_SUCCESS_RATE = 0.3
"""Share of control packets that must arrive."""
TRACKING = 2.0
"""Factor on the tracking monitors: the emulator falls behind real time, which shows as lag while it moves."""

MEAN_FOLLOWING = 0.030
"""Largest mean distance of streamed and measured TCP over an episode [m]. At 0.2 m/s the arm lags by 22 mm."""
FINAL_FOLLOWING = 0.015
"""Largest distance of the measured TCP from the last target, once that stands [m]."""
FINAL_TURN = 0.08
"""The same for orientation [rad]."""
ASKED_TRAVEL = 0.010
"""A policy whose targets leave the start by more than this [m] asks the arm to move..."""
TRAVEL_SHARE = 0.5
"""...and it must come this share of the way at least."""


def relaxed(limits: SafetyLimits) -> SafetyLimits:
    """Limits for an episode on the emulator: monitors that judge timing are wider; what bounds motion is as it was."""
    return limits.model_copy(
        update={
            "max_state_age": max(STATE_AGE, limits.max_state_age),
            "stream_timeout": max(STREAM_TIMEOUT, limits.stream_timeout),
            "max_chunk_age": max(CHUNK_AGE, limits.max_chunk_age),
            "watchdog": max(WATCHDOG, limits.watchdog),
            "min_success_rate": min(MIN_SUCCESS_RATE, limits.min_success_rate),
            "max_tracking_error": TRACKING * limits.max_tracking_error,
            "max_tracking_turn": TRACKING * limits.max_tracking_turn,
        }
    )


@contextmanager
def running_emulator(q: Sequence[float], width: float = 0.08, *, timeout: float = 90.0) -> Iterator[str]:
    """Run the emulator from joint positions ``q`` [7] (rad) and hand opening ``width`` (m); yields its address.

    Raises:
        WorkerError: it did not come up within ``timeout`` seconds.
    """
    arguments = ["--q", json.dumps([float(x) for x in q]), "--width", str(width)]
    with running_child("gsrl_core.deploy.emulator", arguments, timeout=timeout) as announced:
        yield announced["host"]


def _end_stopped_commands() -> None:
    # A real hand answers the command that a stop interrupts; franky-sim forgets it, and its client waits for ever.
    from franky_sim.franka_gripper_protocol import GripperCommandStatus
    from franky_sim.franka_gripper_server import FrankaGripperServer
    from franky_sim.franka_server import BaseCommand

    stop = FrankaGripperServer.stop

    def answering_stop(server: Any, command_id: int, tcp_socket: Any) -> None:
        pending = (server._pending_tcp_socket, server._pending_command_type, server._pending_command_id)
        stop(server, command_id, tcp_socket)
        if None not in pending:
            types = {"command_type_struct": "H", "status_type_struct": "H"}
            BaseCommand.send_response(*pending, GripperCommandStatus.kAborted, **types)

    FrankaGripperServer.stop = answering_stop


def main() -> None:
    """Entry point of the child process."""
    from franky_sim import SimulationServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    _end_stopped_commands()

    parser = argparse.ArgumentParser()
    parser.add_argument("--q", type=json.loads, required=True)
    parser.add_argument("--width", type=float, required=True)
    options = parser.parse_args()
    end_with_parent()
    with MujocoSimulator() as simulator:
        robot = simulator.add_robot(initial_q=options.q, initial_hand_width=options.width)
        with SimulationServer(simulator) as server:
            announce({"host": robot.hostname})
            server.run_forever()


if __name__ == "__main__":
    main()
