"""A process that is guarded ends with the one that guards it, also after SIGKILL."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.cluster

PARENT = """
import subprocess, sys, time
from pathlib import Path
from serve_apps.vllm_guard import end_with_this_process, remove_with_this_process
import gc
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
end_with_this_process(child.pid)
remove_with_this_process(Path(sys.argv[1]))
gc.collect()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_neither_process_nor_folder_outlives_a_killed_parent(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    (folder / "one").touch()
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        family = psutil.Process(parent.pid).children()
        time.sleep(2)  # a watcher that mistakes anything else for the end would have struck by now
        assert child.is_running()
        assert child.status() != psutil.STATUS_ZOMBIE
        assert folder.is_dir()
        parent.kill()
        parent.wait()
        gone, alive = psutil.wait_procs(family, timeout=5)
    assert {process.pid for process in gone} >= {child.pid}
    assert alive == []  # nor do the watchers
    assert not folder.exists()
