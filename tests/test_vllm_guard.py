"""A process that is guarded ends with the one that guards it, also after SIGKILL."""

import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.cluster

PARENT = """
import subprocess, sys, time
from serve_apps.vllm_guard import end_with_this_process
import gc
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
end_with_this_process(child.pid)
gc.collect()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_guarded_process_does_not_outlive_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        family = psutil.Process(parent.pid).children()
        time.sleep(2)  # a watcher that mistakes anything else for the end would have struck by now
        assert child.is_running()
        assert child.status() != psutil.STATUS_ZOMBIE
        parent.kill()
        parent.wait()
        gone, alive = psutil.wait_procs(family, timeout=5)
    assert {process.pid for process in gone} >= {child.pid}
    assert alive == []  # nor does the watcher
