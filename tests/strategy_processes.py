"""Train jobs in two processes joined by gloo, without Ray: the same steps as those of Ray Train's workers."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from cluster.models.base import load_base
from train_jobs.evaluate import Evaluation, evaluate
from train_jobs.job import TrainJob
from train_jobs.pack import build_pack
from train_jobs.sharding import write_trained
from train_jobs.state import read_state, write_state
from train_jobs.step import train_step
from train_jobs.strategy import accelerator_for

WORKERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some steps of a job, after those of another part that left its state."""

    job: TrainJob
    steps: range
    after: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a part gave; its weights lie in a folder of its name."""

    losses: list[float]
    before: Evaluation
    after: Evaluation


def train(part: Part, name: str, folder: Path) -> Trained:
    """Train `part` as one of the workers there are; leave its state, and what was trained, in `folder`."""
    accelerator = accelerator_for(part.job)
    base = load_base(part.job.card, precision=part.job.precision, compute_dtype=getattr(torch, part.job.compute_dtype))
    pack = build_pack(part.job, base.model, accelerator)
    if part.after is not None:
        write_state(pack, torch.load(folder / f"{part.after}.pt", weights_only=True))
    before = evaluate(pack, base.tokenizer, slot=None)
    losses = [train_step(pack, {0: step}).losses[0] for step in part.steps]
    after = evaluate(pack, base.tokenizer, slot=0)
    write_trained(pack, 0, folder / name)
    state = read_state(pack)
    if accelerator.is_main_process:
        torch.save(state, folder / f"{name}.pt")
    accelerator.wait_for_everyone()
    return Trained(losses=losses, before=before, after=after)


def forget() -> None:
    """Let the next job of this process begin as the first one did."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train_together(parts: dict[str, Part], folder: Path) -> dict[str, Trained]:
    """Return what `parts` give on two workers, one after the other: results by name."""
    (folder / "parts.pkl").write_bytes(pickle.dumps(parts))
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join([root, *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    # Not as a script: what it pickles would be of a module called __main__.
    call = f"import strategy_processes as me; me.work({{}}, me.Path({str(folder)!r}))"
    workers = [subprocess.Popen([sys.executable, "-c", call.format(rank)], env=environment) for rank in range(WORKERS)]
    try:
        for worker in workers:
            assert worker.wait(timeout=400) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    results: dict[str, Trained] = pickle.loads((folder / "trained.pkl").read_bytes())  # noqa: S301 -- written above
    return results


def work(rank: int, folder: Path) -> None:
    """Train the parts in `folder` as worker `rank`; the first one writes what they gave."""
    sizes: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORKERS, "LOCAL_WORLD_SIZE": WORKERS}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORKERS,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Trained] = {}
    parts: dict[str, Part] = pickle.loads((folder / "parts.pkl").read_bytes())  # noqa: S301 -- by `train_together`
    for name, part in parts.items():
        results[name] = train(part, name, folder)
        forget()
    if rank == 0:
        (folder / "trained.pkl").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()
