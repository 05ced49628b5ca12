"""Let the end of a job be an orderly one."""

import signal
from types import FrameType


def treat_sigterm_as_ctrl_c() -> None:
    """Clean up on SIGTERM, which `ray job stop` sends, as on Ctrl-C.

    To be called again after `ray.init`, whose own handler prints a stack and aborts the process.
    """
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)
