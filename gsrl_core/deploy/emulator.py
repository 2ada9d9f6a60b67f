"""The FR3 control-interface emulator (franky-sim, MuJoCo physics) as a child process.

It listens on a free loopback address of its own (127.x.y.z, ports 1337 and 1338), so several can run side by side. It
checks no limits and models no external force: it shows that client, protocol and motion work, not that they are safe.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gsrl_core.deploy.child import announce, end_with_parent, running_child


@contextmanager
def running_emulator(q: Sequence[float], width: float = 0.08, *, timeout: float = 90.0) -> Iterator[str]:
    """Run the emulator from joint positions ``q`` [7] (rad) and hand opening ``width`` (m); yields its address.

    Raises:
        WorkerError: it did not come up within ``timeout`` seconds.
    """
    arguments = ["--q", json.dumps([float(x) for x in q]), "--width", str(width)]
    with running_child("gsrl_core.deploy.emulator", arguments, timeout=timeout) as announced:
        yield announced["host"]


def main() -> None:
    """Entry point of the child process."""
    from franky_sim import SimulationServer
    from franky_sim.mujoco_simulator import MujocoSimulator

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
