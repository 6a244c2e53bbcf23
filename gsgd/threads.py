"""How many threads a step may take."""

from __future__ import annotations

import os

MOST = 4096

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# the OpenMP runtime's threads do not survive a fork, and a parallel region in the child would wait for them forever
os.register_at_fork(after_in_child=_after_fork)


def default_threads() -> int:
    """OMP_NUM_THREADS, or the number of processors that this process may use."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and 1 <= int(first) <= MOST:
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads(threads: int) -> int:
    """One in a child process, otherwise `threads`."""
    return 1 if _forked else threads


def check_threads(threads: int) -> int:
    """`threads`, if it is a number of threads."""
    if not isinstance(threads, int):
        raise TypeError(f"threads: expected an integer, got {threads!r}")
    if not 1 <= threads <= MOST:
        raise ValueError(f"threads: expected 1 to {MOST}, got {threads!r}")
    return threads
