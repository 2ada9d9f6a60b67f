"""Child processes that say when they are ready and never outlive their parent.

Protocol: the child prints one JSON line on standard output when it is ready (:func:`announce`) and ends when its
standard input closes, which the operating system does even if the parent was killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from gsrl_core.errors import WorkerError

_ROOT = Path(__file__).parents[2]


@contextmanager
def running_child(module: str, arguments: Sequence[str], *, timeout: float) -> Iterator[dict[str, Any]]:
    """Run ``python -m module`` for the length of the block; yields what it announced.

    Raises:
        WorkerError: it ended or stayed silent for ``timeout`` seconds; carries the end of its error output.
    """
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=child_environment(),
        )
        expired = threading.Event()
        timer = threading.Timer(timeout, lambda: (expired.set(), process.kill()))
        timer.start()
        try:
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                process.wait(10)
                log.seek(0)
                how = f"was silent for {timeout:.0f} s" if expired.is_set() else f"ended with code {process.returncode}"
                raise WorkerError(f"{module} {how}: {log.read()[-1500:].strip() or 'no error output'}")
            yield json.loads(line)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def child_environment() -> dict[str, str]:
    """The environment in which a child finds this package, wherever the parent was started."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}


def announce(values: dict[str, Any]) -> None:
    """In the child: say that it is ready (``pid`` is added). What libraries print later goes to standard error."""
    sys.stdout.write(json.dumps({"pid": os.getpid(), **values}) + "\n")
    sys.stdout.flush()
    os.dup2(2, 1)


def end_with_parent() -> None:
    """In the child: leave as soon as the parent is gone."""
    descriptor = sys.stdin.fileno()

    def watch() -> None:
        # Not sys.stdin.read(): a daemon thread that holds its lock aborts the interpreter's own exit.
        while os.read(descriptor, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
