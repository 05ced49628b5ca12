import os
import subprocess
import sys

from train_jobs.allocator import WORKER_ENV


def test_a_process_that_begins_like_a_worker_allocates_with_jemalloc() -> None:
    code = "import torch; torch.ones(2**20); print('libjemalloc.so' in open('/proc/self/maps').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | WORKER_ENV, capture_output=True, check=True, text=True
    )
    # of what it does not understand of its settings, jemalloc complains
    assert (done.stdout, done.stderr) == ("True\n", "")
