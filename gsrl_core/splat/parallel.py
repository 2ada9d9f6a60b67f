"""Threads for numba kernels that release the GIL.

A plain thread pool is used instead of numba's own parallel regions: it survives ``fork`` (GNU OpenMP does not), may be
entered from several threads at once (numba's workqueue may not), and does not spin on the cores that torch needs.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from numba import config as numba_config

_inside = threading.local()


def num_threads() -> int:
    """Threads that the CPU rasteriser uses: ``NUMBA_NUM_THREADS``, by default the cores this process may run on."""
    return int(numba_config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]


def run_chunks(kernel: Callable[[int, int], object], count: int, chunk: int) -> None:
    """Call ``kernel(start, stop)`` for consecutive ranges of at most ``chunk`` that cover ``range(count)``.

    Chunks are handed to whichever thread is free, so ``kernel`` must not depend on order and must write to places that
    belong to its range alone. Called from inside a kernel it stays on that thread (waiting for the pool from within the
    pool would never end). Exceptions are raised here after all threads have stopped.
    """
    chunks = -(-count // chunk)
    workers = 1 if getattr(_inside, "kernel", False) else min(num_threads(), chunks)
    if workers <= 1:
        if count:
            kernel(0, count)
        return
    ticket = itertools.count()

    def work() -> None:
        _inside.kernel = True
        try:
            while (start := next(ticket) * chunk) < count:
                kernel(start, min(start + chunk, count))
        finally:
            _inside.kernel = False

    futures = [_pool().submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise errors[0]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, num_threads() - 1), thread_name_prefix="splat")


# A forked child inherits the pool object but none of its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
