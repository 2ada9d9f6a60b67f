"""Run a command that never outlives whoever started it: ``python guard.py <command ...>``, standard input a pipe.

The command runs in a process group of its own together with this guard. When the pipe closes, which the operating
system does even if the starter was killed, or when the guard is asked to end, the whole group ends. Only the standard
library is imported, so that a guard is cheap.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

_GRACE_S = 8.0


def main() -> int:
    """Start the command, wait for it or for the end of the starter, and return the command's exit code."""
    os.setsid()
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    while child.poll() is None and not asked:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 4096):
            asked.append(0)
    if child.poll() is None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    code = child.poll()
    # Whatever the command left in the group ends too, and so does this process.
    if code is None or asked:
        os.killpg(0, signal.SIGKILL)
    return code if code is not None else 1


if __name__ == "__main__":
    sys.exit(main())
