"""Entry point of a physics worker: ``python -m gsrl_core.sim.worker SOCKET_FD MEMORY_FD NUM_ENVS HORIZON``.

A fresh interpreter instead of a multiprocessing child: it imports SAPIEN and numpy only, whatever the parent's main
module would import, and needs no ``if __name__ == "__main__"`` guard in user scripts. Memory and socket are inherited
descriptors without names, so nothing is left behind however either side dies.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

_PARENT_CHECK_SECONDS = 5.0


def main(socket_fd: int, memory_fd: int, num_envs: int, horizon: int) -> None:
    """Serve commands until told to close, or until the parent is gone."""
    from gsrl_core.sim import states
    from gsrl_core.sim.episodes import Episodes
    from gsrl_core.sim.scheduling import give_way

    give_way()
    faulthandler.enable()  # a crash in native code leaves last words
    # Ctrl-C reaches the whole process group; whether to stop is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    commands = Connection(socket_fd)
    try:
        settings = commands.recv()
    except EOFError:
        return
    sizes = (num_envs, horizon, len(settings.objects))
    block = mmap.mmap(memory_fd, states.size_in_bytes(*sizes))
    os.close(memory_fd)
    episodes = Episodes(settings, states.view(block, *sizes))
    while True:
        # The socket closes with the parent; a child that the parent forked may hold it open, hence the second test.
        while not commands.poll(_PARENT_CHECK_SECONDS):
            if os.getppid() != parent:
                return
        try:
            name, *arguments = commands.recv()
        except EOFError:
            return
        if name == "close":
            return
        try:
            answer = ("done", getattr(episodes, name)(*arguments))
        except Exception as error:
            answer = ("raised", type(error).__name__, str(error), traceback.format_exc())
        try:
            commands.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
