"""The memory of a program with all of its processes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import psutil

INTERVAL_S = 5.0
"""To tell what is shared, the kernel walks all pages of a process: with twenty of them, once a second was a fifth of a
core, for which the two threads that train had to wait."""


@dataclass(kw_only=True)
class Peak:
    """The largest sum that was seen."""

    num_bytes: int = 0


def peak_of_processes() -> AbstractContextManager[Peak]:
    """Watch this process and all that descend from it; what several share is counted once."""
    return peak_of(_resident_bytes, interval_s=INTERVAL_S)


@contextmanager
def peak_of(num_bytes: Callable[[], int], *, interval_s: float) -> Iterator[Peak]:
    """Watch what `num_bytes` returns."""
    peak, is_over = Peak(), threading.Event()

    def watch() -> None:
        while not is_over.wait(interval_s):
            peak.num_bytes = max(peak.num_bytes, num_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        is_over.set()
        watcher.join()


def _resident_bytes() -> int:
    own = psutil.Process()
    return sum(_share(process) for process in [own, *own.children(recursive=True)])


def _share(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0
