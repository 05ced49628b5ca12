"""The peak memory of training, in a process of its own: `python -m benchmarks.memory_run '{...}'` prints it.

Samples are as long as the plan allows and every token has a label: what a plan has to cover.
"""

import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.processes import peak_of

INTERVAL_S = 0.02
R = 8
NUM_STEPS = 2
"""The second one has the optimizer's state from its beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """One way to train SmolLM2."""

    method: str
    precision: str
    micro_batch_size: int
    max_length: int
    gradient_checkpointing: bool = False
    lora_dropout: float = 0.0
    gradient_accumulation_steps: int = 2
    """Unless a micro-batch takes several passes, the second one is the first that finds gradients."""
    num_workers: int = 1
    rank: int = 0
    """Of this process, where several workers train."""
    meeting: str = ""
    """File by which several workers find each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNumbers:
    """Largest resident sizes of the process, in bytes."""

    importing: int
    loading: int
    """Without the pages of the checkpoint that is being quantized: the system takes them back when it needs them."""
    training: int


def peak_bytes() -> int:
    """Return the largest resident size since the last call.

    Not what `getrusage` says: that begins with the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) * 1024


def bytes_beside_weights() -> int:
    """Return the resident size of the process without the files of weights that are mapped."""
    return sum(one.rss for one in psutil.Process().memory_maps() if not one.path.endswith(".safetensors"))


def train(settings: MemorySettings) -> MemoryNumbers:
    """Train as a worker does."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    import train_jobs.worker  # noqa: F401 -- what a worker imports counts
    from benchmarks.memory_job import job_of
    from cluster.models.base import load_base
    from train_jobs.pack import build_pack
    from train_jobs.step import train_step
    from train_jobs.strategy import accelerator_for

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.num_workers))
    disable_progress_bar()
    importing = peak_bytes()
    job = job_of(settings)
    accelerator = accelerator_for(job)
    with peak_of(bytes_beside_weights, interval_s=INTERVAL_S) as firm:
        base = load_base(job.card, precision=job.precision, compute_dtype=torch.float32)
    with_files = peak_bytes()
    loading = with_files if job.precision == "fp32" else firm.num_bytes  # there the mapped file is the weights
    pack = build_pack(job, base.model, accelerator)
    for step in range(NUM_STEPS):
        train_step(pack, {0: step})
    return MemoryNumbers(importing=importing, loading=loading, training=peak_bytes())


def join(settings: MemorySettings) -> None:
    """Join the other workers, as Ray Train does it."""
    import torch

    sizes = {"RANK": settings.rank, "LOCAL_RANK": settings.rank}
    sizes |= {"WORLD_SIZE": settings.num_workers, "LOCAL_WORLD_SIZE": settings.num_workers}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{settings.meeting}", rank=settings.rank, world_size=settings.num_workers
    )


def random_tokens(settings: MemorySettings, count: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Return the tokens of `count` samples that have nothing in common."""
    generator = random.Random(0)  # noqa: S311 -- no secrets
    return [tuple(generator.choices(range(vocab_size), k=settings.max_length)) for _ in range(count)]


def main() -> None:
    """Train and print the numbers as the last line."""
    settings = MemorySettings(**json.loads(sys.argv[1]))
    if settings.num_workers > 1:
        join(settings)
    print(json.dumps(asdict(train(settings))))


if __name__ == "__main__":
    main()
