"""Threads that compute and end, so that the engine's thread is the only one that keeps helpers.

GNU's OpenMP keeps helper threads for every thread that ever computed in parallel. As soon as a process has more threads
of this kind than cores, a helper sleeps at once after each operation, instead of looking out for the next one for a
moment, and waking it takes some 50 microseconds, 270 times in a pass of SmolLM2-135M.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def run(work: Callable[[], T]) -> T:
    """Return what `work` returns in a thread of its own."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()


async def run_async(work: Callable[[], T]) -> T:
    """Return what `work` returns in a thread of its own, which goes on to its end when the caller is cancelled."""
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, partial(copy_context().run, work))
    finally:
        thread.shutdown(wait=False)
