"""One size of `benchmarks.streaming`, in a process of its own, whose last line is JSON."""

import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from benchmarks.random_model import write_random_model
from benchmarks.streaming import MIB, PROCESSES
from train_jobs import token_cache
from train_jobs.arguments import Request
from train_jobs.finetune import check
from train_jobs.launch import kept_until_registered, launch
from train_jobs.prepare import build_job, read_data
from train_jobs.run_store import new_run

NUM_STEPS = 5
NUM_WORKERS = 2
SAMPLE_S = 1.0
WORDS = ("the", "a", "cat", "smith", "sword", "fire", "iron", "sells", "makes", "asks", "when", "blue", "鍛冶屋", "火")


def write_dialogues(path: Path, num_samples: int) -> None:
    """Write short dialogues, no two of them the same."""
    chooser = random.Random(num_samples)  # noqa: S311 -- words, not secrets
    with path.open("w") as file:
        for number in range(num_samples):
            asked, said = (" ".join(chooser.choices(WORDS, k=chooser.randint(4, 24))) for _ in range(2))
            messages = [
                {"role": "user", "content": f"{number}: {asked}?"},
                {"role": "assistant", "content": f"{said}."},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Yield the peak resident memory in MiB by kind of process, kept up to date while the body runs."""
    peaks: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            _note(peaks)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        _note(peaks)
        over.set()
        thread.join()


def _note(peaks: dict[str, float]) -> None:
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            name = "driver" if process == me else " ".join(process.cmdline())
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.Error, OSError):
            continue
        kind = next((kind for kind, mark in PROCESSES.items() if mark in name), None)
        peak_kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
        if kind is not None:
            peaks[f"{kind}, MiB"] = max(peaks.get(f"{kind}, MiB", 0.0), peak_kib * 1024 / MIB)


def request_of(model: Path, data: Path) -> Request:
    """Return what `kajiya train` would be asked for."""
    return Request(
        model=str(model),
        data=str(data),
        name="streaming",
        eval_data=None,
        epochs=1.0,
        max_steps=NUM_STEPS,
        method="lora",
        precision="fp32",
        max_length=512,
        train_on="all",
        num_workers=NUM_WORKERS,
        seed=0,
        overrides={"micro_batch_size": "8", "gradient_accumulation_steps": "1"},
    )


def run(home: Path, num_samples: int) -> dict[str, float]:
    """Return every number of this size."""
    os.environ["KAJIYA_HOME"] = str(home)
    token_cache.LARGE_BYTES = 0  # all sizes take the way of large ones
    data = home / "dialogues.jsonl"
    write_dialogues(data, num_samples)
    request = request_of(write_random_model(home / "model"), data)
    plan = check(request)
    ray.init("local", num_cpus=NUM_WORKERS, include_dashboard=False, log_to_driver=False, object_store_memory=256 * MIB)
    store = new_run("streaming", None)
    store.write_record(b"{}")  # by which workers see that it is the same place for them
    with watched() as peaks, kept_until_registered(store):
        begin_s = time.perf_counter()
        tokens = read_data(request, plan)
        tokenized_s = time.perf_counter() - begin_s
        read_data(request, plan)
        again_s = time.perf_counter() - begin_s - tokenized_s
        job = build_job(request, plan, tokens)
        outcome = launch(job, store, num_workers=NUM_WORKERS, use_gpu=False)
    num_tokens = tokens.train.num_tokens + tokens.held_out.num_tokens
    return {
        "tokens": num_tokens,
        "file, MiB": data.stat().st_size / MIB,
        "tokenizing, s": tokenized_s,
        "dialogues/s": num_samples / tokenized_s,
        "tokens/s": num_tokens / tokenized_s,
        "from the cache, s": again_s,
        "a step, s": outcome.history[-1].duration_s,
        **peaks,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="kj-") as name:
        numbers = run(Path(name), int(sys.argv[1]))
        ray.shutdown()
    print(json.dumps(numbers))
