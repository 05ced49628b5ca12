"""A plan's memory beside what training takes: `python -m benchmarks.memory`.

Each way to train SmolLM2 that a CPU has, in processes of its own: the sum of the plan's table against the largest
resident size of the workers.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.adapter_files import MODEL
from benchmarks.child import run_module
from benchmarks.claims import Claim, Result, conclude, print_result
from benchmarks.load import spread
from benchmarks.memory_run import MemoryNumbers, MemorySettings, R
from cluster.catalog import find
from cluster.hardware import declared
from cluster.memory import GIB
from cluster.plan import plan_training
from train_jobs.allocator import WORKER_ENV

TOLERANCE = 0.1
ANY_RAM = 4096 * GIB
"""So that the plan is the one that is asked for."""
LORA = MemorySettings(method="lora", precision="fp32", micro_batch_size=1, max_length=512)
FULL = replace(LORA, method="full")
NF4, INT8 = replace(LORA, method="qlora", precision="nf4"), replace(LORA, method="qlora", precision="int8")


def _wide(settings: MemorySettings, micro_batch_size: int, max_length: int) -> MemorySettings:
    return replace(settings, micro_batch_size=micro_batch_size, max_length=max_length, gradient_accumulation_steps=1)


def ways() -> list[MemorySettings]:
    """Return every way to train that a CPU has, with several shapes."""
    return [
        LORA,
        _wide(LORA, 4, 512),
        _wide(LORA, 8, 128),
        _wide(LORA, 2, 1024),
        _wide(LORA, 1, 2048),
        replace(LORA, lora_dropout=0.1),
        replace(_wide(LORA, 2, 1024), lora_dropout=0.1),
        replace(LORA, gradient_checkpointing=True),
        replace(_wide(LORA, 1, 2048), gradient_checkpointing=True),
        NF4,
        replace(_wide(NF4, 1, 1024), lora_dropout=0.1),
        INT8,
        replace(_wide(INT8, 2, 512), gradient_checkpointing=True),
        FULL,
        _wide(FULL, 2, 512),
        replace(_wide(FULL, 2, 1024), gradient_checkpointing=True),
        replace(LORA, num_workers=2),
        replace(FULL, max_length=128, num_workers=2),
    ]


def name_of(settings: MemorySettings) -> str:
    """Return the way in words."""
    words = [settings.method, settings.precision, f"{settings.micro_batch_size} x {settings.max_length}"]
    words += ["dropout"] * bool(settings.lora_dropout) + ["checkpointing"] * settings.gradient_checkpointing
    words += [f"{settings.num_workers} workers"] * (settings.num_workers > 1)
    return " ".join(words)


def planned_bytes(settings: MemorySettings) -> int:
    """Return the sum of the plan's table."""
    overrides: dict[str, object] = {
        "micro_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    if settings.method != "full":
        overrides |= {"r": R, "lora_dropout": settings.lora_dropout}
    plan = plan_training(
        find(MODEL),
        declared(gpu=None, num_cpus=2, ram_bytes=ANY_RAM),
        method=settings.method,  # type: ignore[arg-type]
        precision=settings.precision,  # type: ignore[arg-type]
        overrides=overrides,
        max_length=settings.max_length,
        num_workers=settings.num_workers,
    )
    return plan.memory.total_bytes


def measure(settings: MemorySettings) -> list[MemoryNumbers]:
    """Return what each worker took."""
    with TemporaryDirectory(prefix="kajiya-bench-") as folder, ThreadPoolExecutor() as threads:
        workers = [replace(settings, rank=rank, meeting=f"{folder}/meeting") for rank in range(settings.num_workers)]
        return list(threads.map(_measure_one, workers))


def _measure_one(settings: MemorySettings) -> MemoryNumbers:
    found = run_module("benchmarks.memory_run", json.dumps(asdict(settings)), environment=WORKER_ENV)
    return MemoryNumbers(**found)


def compare(settings: MemorySettings) -> Result:
    """Return both sizes, and whether they agree."""
    workers = measure(settings)
    planned = planned_bytes(settings)
    taken = sum(max(worker.loading, worker.training) for worker in workers)
    sizes = {
        "predicted": planned,
        "measured": taken,
        "while importing": sum(worker.importing for worker in workers),
        "while loading": sum(worker.loading for worker in workers),
    }
    return Result(
        numbers={name: spread([size / GIB]) for name, size in sizes.items()}
        | {"predicted over measured": spread([planned / taken])},
        unit="GiB",
        claims=(
            Claim(
                what=f"{name_of(settings)}: off by",
                measured=abs(planned / taken - 1),
                bound=TOLERANCE,
                direction="at most",
                unit="of it",
            ),
        ),
    )


def main() -> None:
    """Measure, print the tables, write the JSON; exit with 1 when a plan is further off than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only ways whose name has this in it")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    console, begin = Console(), time.perf_counter()
    results: dict[str, Result] = {}
    for settings in ways():
        name = name_of(settings)
        if arguments.only in name:
            results[name] = compare(settings)
            print_result(name, results[name], console)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")
    conclude(results, console, arguments.json)


if __name__ == "__main__":
    main()
