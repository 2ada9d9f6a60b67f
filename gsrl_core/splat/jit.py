"""How the CPU kernels are compiled and where the machine code is kept.

numba notices a change of the file that holds a function, not of the files whose constants and inlined helpers went into
its machine code. The code is therefore kept in a folder named by the digest of all sources of this package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import config as numba_config

_KEPT_SECONDS = 30 * 24 * 3600
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def source_digest(folder: Path) -> str:
    """Digest of the Python files in ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def keep_machine_code(package: Path) -> None:
    """Let numba keep its machine code under ``package/__pycache__``, one folder for each state of the sources.

    Under ``NUMBA_CACHE_DIR`` instead, if that is set; where nothing can be written, numba finds a place of its own. The
    folders of states not used for a month are removed.
    """
    root = Path(os.environ.get("NUMBA_CACHE_DIR") or package / "__pycache__")
    folder = root / f"numba-{source_digest(package)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()
        for old in root.glob("numba-*"):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return
    numba_config.CACHE_DIR = str(folder)  # pyright: ignore[reportAttributeAccessIssue]


keep_machine_code(Path(__file__).parent)

# No "nnan"/"ninf": a non-finite colour must stay visible in the picture.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
kernel: Compiler = numba.njit(nogil=True, cache=True, error_model="numpy")
# A call with array arguments pushes seven words for each; in a loop over Gaussians that costs more than the arithmetic.
inlined: Compiler = numba.njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
# For loops that do one thing each: the compiler turns such loops, and only such, into vector code.
vectorized: Compiler = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
vectorized_inlined: Compiler = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST, forceinline=True)
