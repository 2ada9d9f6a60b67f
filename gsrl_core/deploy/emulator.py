"""The FR3 control-interface emulator (franky-sim, MuJoCo physics) as a child process.

It listens on a free loopback address of its own (127.x.y.z, ports 1337 and 1338), so several can run side by side. It
checks no limits and models no external force: it shows that client, protocol and motion work, not that they are safe.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from gsrl_core.errors import SafetyError


@contextmanager
def running_emulator(q: Sequence[float], width: float = 0.08, *, timeout: float = 60.0) -> Iterator[str]:
    """Start the emulator at joint positions ``q`` [7] (rad) and hand opening ``width`` (m); yields its address.

    The process ends with the block, and also when this process dies, because it watches its standard input.

    Raises:
        SafetyError: it did not come up within ``timeout`` seconds.
    """
    arguments = [sys.executable, "-m", "gsrl_core.deploy.emulator", "--q", json.dumps(list(q)), "--width", str(width)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")]))}
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                process.wait(10)
                log.seek(0)
                raise SafetyError(
                    f"the FR3 emulator (franky-sim) did not start within {timeout:.0f} s: {log.read()[-800:].strip()}"
                )
            yield json.loads(line)["host"]
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _root() -> str:
    return str(Path(__file__).parents[2])


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Entry point of the child process: prints one JSON line with the address, then runs until stdin closes."""
    from franky_sim import SimulationServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    parser = argparse.ArgumentParser()
    parser.add_argument("--q", type=json.loads, required=True)
    parser.add_argument("--width", type=float, required=True)
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with MujocoSimulator() as simulator:
        robot = simulator.add_robot(initial_q=options.q, initial_hand_width=options.width)
        with SimulationServer(simulator) as server:
            sys.stdout.write(json.dumps({"host": robot.hostname}) + "\n")
            sys.stdout.flush()
            server.run_forever()


if __name__ == "__main__":
    main()
