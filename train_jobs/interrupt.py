"""Let the end of a job be an orderly one."""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_PENDING_CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_pending: list[Any] = []
"""Calls that the main thread has not made yet; C keeps no reference to them."""


def treat_sigterm_as_ctrl_c() -> None:
    """Clean up on SIGTERM, which `ray job stop` sends, as on Ctrl-C.

    To be called again after `ray.init`, whose own handler prints a stack and aborts the process.
    """
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


@contextmanager
def told_to_leave() -> Iterator[threading.Event]:
    """Yield what SIGTERM sets in the body, instead of ending the process: whoever looks can put things away first.

    Python takes signal handlers from its main thread alone, and Ray Train trains in another one.
    """
    told = threading.Event()
    before: list[Any] = []
    _in_main_thread(lambda: before.append(signal.signal(signal.SIGTERM, lambda *_: told.set())))
    try:
        yield told
    finally:
        _in_main_thread(lambda: signal.signal(signal.SIGTERM, before[0]))


def _in_main_thread(call: Callable[[], object]) -> None:
    """Make `call` now, or from another thread as soon as the main one runs Python again; calls keep their order."""
    if threading.current_thread() is threading.main_thread():
        call()
        return

    def make(_: object) -> int:
        _pending.remove(pending)
        call()
        return 0

    pending = _PENDING_CALL(make)
    _pending.append(pending)
    ctypes.pythonapi.Py_AddPendingCall(pending, None)
