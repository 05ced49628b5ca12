"""Who goes first where the threads of a replica want the same cores."""

import os
import threading

ENGINE_NICENESS = 3
"""Of the engine's threads above the others of their process: half their share of a core that both want."""


def step_back() -> None:
    """Let this thread, and those that share its products, make way for those that carry requests and answers.

    On a CPU the engine keeps all cores busy, and a thread that hands on a first token would wait for its turn.
    """
    thread = threading.get_native_id()  # on Linux each thread has a niceness of its own, which those it starts inherit
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + ENGINE_NICENESS)
