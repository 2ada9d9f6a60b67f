"""Time as the FR3 emulator simulates it, so that a busy machine makes a test slower and changes nothing else.

The emulator runs in real time whatever becomes of its client: one that gets no processor for 100 ms finds an arm that
went on for 100 ms with the last torques it was given, and an emulator that gets none is behind the setpoints that its
client goes on sending. Here the two are tied together, by two numbers in a file that both have mapped:

* the client's modules read the emulator's milliseconds as their ``time``;
* the emulator waits for libfranka's answer to each state while the arm is in motion, and for the client's main thread
  to look at the clock again (at most :data:`LEAD` ms ahead of it).

A main thread that does not look because it waits in native code (for the end of a stop) is recognised by its silence,
:data:`SILENCE` of real time; the emulator then goes on slowly, until the next look.
"""

import threading
import time

import numpy as np

LEAD = 20
"""Milliseconds that the emulator may be ahead of the last look at the clock."""
SILENCE = 0.4
"""Real seconds; libfranka takes a robot that is silent for 1 s for lost."""
DEAD = 5.0
"""Real seconds without a millisecond of the emulator: it is gone, and time goes on without it."""
MODULES = (
    "gsrl_core.deploy.camera",
    "gsrl_core.deploy.franky_robot",
    "gsrl_core.deploy.hand",
    "gsrl_core.deploy.loop",
    "gsrl_core.deploy.robot",
    "gsrl_core.deploy.watchdog",
    "gsrl_core.package_run",
)
"""The client: all that compares times of the arm."""

TIED_EMULATOR = f"""
import sys
if "gsrl_core.deploy.emulator" in sys.orig_argv:
    import select, time
    from pathlib import Path
    import numpy as np
    from franky_sim.simulation_server import SimulationServer

    shared = np.memmap(Path(__file__).with_name("milliseconds"), np.int64, "r+", shape=(2,))
    run_once = SimulationServer.run_once
    silent_since = None

    def answered(server):
        if server.current_motion_id > 0 and server.udp_connected:
            select.select([server._FrankaServer__udp_socket], [], [], {SILENCE})

    def looked_at():
        global silent_since
        if shared[1] == silent_since:  # it waits in native code
            time.sleep(0.003)
            return
        silent_since, deadline = None, time.monotonic() + {SILENCE}
        while shared[0] >= shared[1] + {LEAD}:
            if time.monotonic() > deadline:
                silent_since = int(shared[1])
                return
            time.sleep(0.0003)

    def tied(self, realtime=True):
        looked_at()
        for server in self.robot_servers:
            answered(server)
        run_once(self, realtime)
        shared[0] += 1

    SimulationServer.run_once = tied
"""


class EmulatedTime:
    """Stands in for the module ``time`` in the client of one emulator after the other."""

    def __init__(self, folder):
        file = folder / "milliseconds"
        file.write_bytes(bytes(16))
        (folder / "sitecustomize.py").write_text(TIED_EMULATOR)
        self._shared = np.memmap(file, np.int64, "r+", shape=(2,))
        self._lock = threading.Lock()
        self._last, self._changed, self._without = 0, time.monotonic(), 0.0

    def monotonic(self):
        with self._lock:
            last, now = int(self._shared[0]), time.monotonic()
            alone = max(0.0, now - self._changed - DEAD)
            if last != self._last:
                self._last, self._changed, self._without = last, now, self._without + alone
                alone = 0.0
            if threading.current_thread() is threading.main_thread():
                self._shared[1] = last
            return 1000.0 + last / 1000.0 + self._without + alone

    perf_counter = monotonic

    def sleep(self, seconds):
        until = self.monotonic() + seconds
        while self.monotonic() < until:
            time.sleep(0.0005)
