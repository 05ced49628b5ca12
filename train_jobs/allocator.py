"""How worker processes allocate: an environment, since an allocator is chosen before a process begins."""

from pathlib import Path

import ray

JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
"""Ray's own copy, which its wheels for Linux have."""
WORKER_ENV = {
    # A training step frees and asks for the same large tensors again and again. glibc (2.36) does not give aligned
    # memory that was freed to the next one who asks for as much, and a worker grew by twice what its step holds:
    # SmolLM2 with 512 tokens at once took 2.2 GiB, under jemalloc 1.65, both in 4.3 s a step.
    **({"LD_PRELOAD": str(JEMALLOC)} if JEMALLOC.is_file() else {}),
    # Memory given back to the system and taken again costs page faults: a tenth of a step, if it were done in every
    # one. Kept for ever it is a tenth more than a pack of trials needs. By default each thread that answers a trial
    # has memory of its own, where what a checkpoint took stays; there is one for all, and a thread that returns it. A
    # size from which tensors would have an arena of their own is not wanted either.
    "MALLOC_CONF": "narenas:1,background_thread:true,oversize_threshold:0,dirty_decay_ms:30000,muzzy_decay_ms:30000",
    # The same of glibc, in case.
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}
