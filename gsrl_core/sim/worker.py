"""Entry point of a physics worker: ``python -m gsrl_core.sim.worker SOCKET_FD MEMORY_FD NUM_ENVS HORIZON``.

A fresh interpreter instead of a multiprocessing child: it imports SAPIEN and numpy only, whatever the parent's main
module would import, and needs no ``if __name__ == "__main__"`` guard in user scripts. Memory and socket are inherited
descriptors without names, so nothing is left behind however either side dies.
"""

from __future__ import annotations

import mmap
import os
import sys
import traceback
from multiprocessing.connection import Connection

_PARENT_CHECK_SECONDS = 5.0


def main(socket_fd: int, memory_fd: int, num_envs: int, horizon: int) -> None:
    """Serve commands until told to close, or until the parent is gone."""
    from gsrl_core.sim import states
    from gsrl_core.sim.episodes import Episodes

    parent = os.getppid()
    commands = Connection(socket_fd)
    block = mmap.mmap(memory_fd, states.size_in_bytes(num_envs, horizon))
    os.close(memory_fd)
    view = states.view(block, num_envs, horizon)
    episodes: Episodes | None = None
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
            if name == "settings":
                episodes = Episodes(*arguments, view)
            else:
                getattr(episodes, name)(*arguments)
            answer = None
        except Exception as error:
            answer = (type(error).__name__, str(error), traceback.format_exc())
        try:
            commands.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
