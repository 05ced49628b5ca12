"""Lets vLLM's engine and its sockets end with their replica, however that ends.

vLLM's workers watch their engine process, but the engine does not watch the process that started it: after a SIGKILL
it would keep its memory and its GPU for ever. The sockets between the two are files that nobody deletes.
"""

import subprocess
import sys
from pathlib import Path

KILLER = """
import os, signal, sys
engine = os.pidfd_open(int(sys.argv[1]))
sys.stdin.buffer.read()
try:
    signal.pidfd_send_signal(engine, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


REMOVER = """
import shutil, sys
sys.stdin.buffer.read()
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


def end_with_this_process(pid: int) -> None:
    """Let process `pid`, which runs now, be killed as soon as the calling process is gone; Linux only."""
    if sys.platform == "linux":
        _watch(KILLER, str(pid))


def remove_with_this_process(folder: Path) -> None:
    """Let `folder` be deleted as soon as the calling process is gone."""
    _watch(REMOVER, str(folder))


def _watch(program: str, argument: str) -> None:
    # Its input ends when the last writer is gone, and that is this process; a session of its own keeps it from dying
    # with this one's group.
    watcher = [sys.executable, "-I", "-S", "-c", program, argument]
    _WATCHERS.append(subprocess.Popen(watcher, stdin=subprocess.PIPE, start_new_session=True))


_WATCHERS: list[subprocess.Popen[bytes]] = []
"""Kept for the life of the process: a pipe that is collected is closed."""
