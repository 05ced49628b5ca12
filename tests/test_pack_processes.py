"""A pack over two workers (gloo): each adapter equals its run alone in one process, through early stop and refill."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pack import adapter, job_of, pack_of
from tiny_models import tiny_llama_folder
from torch.multiprocessing.spawn import spawn

from cluster.catalog import find
from cluster.model_card import Precision
from train_jobs.evaluate import held_out_losses, to_the_end
from train_jobs.job import TrainJob
from train_jobs.step import train_step

pytestmark = pytest.mark.cluster
NUM_WORKERS = 2
FIRST, SECOND, LATE = adapter(1, r=4), adapter(2, r=8, dropout=0.2, lr=3e-3), adapter(3, r=2, lr=3e-2, dropout=0.1)


def job_with(folder: str, precision: Precision, *seeds: int) -> TrainJob:
    runs = [run for run in (FIRST, SECOND, LATE) if run.seed in seeds]
    return replace(job_of(find(folder), *runs, accumulation=2), precision=precision)


def train_together(job: TrainJob) -> dict[int, list[float]]:
    """Return the losses of each adapter by seed, and last its held-out loss; the second leaves after three steps and
    `LATE` takes its slot.
    """
    pack, done = pack_of(job), {0: 0, 1: 0}
    losses: dict[int, list[float]] = {run.seed: [] for run in (FIRST, SECOND, LATE)}
    for number in range(11):
        if number == 3:
            pack.leave(1)
            pack.enter(1, LATE)
            done[1] = 0
        made = train_step(pack, {slot: done[slot] for slot in done if done[slot] < pack.runs[slot].job.num_steps})
        for slot, loss in zip(made.slots, made.losses, strict=True):
            losses[pack.runs[slot].job.seed].append(loss)
            done[slot] += 1
    for slot, loss in enumerate(to_the_end(held_out_losses(pack, [0, 1]))):
        losses[pack.runs[slot].job.seed].append(loss)
    return losses


def train_in_short_passes(job: TrainJob) -> list[float]:
    """Return the losses of the one adapter of `job`, whose workers make several passes between two exchanges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.activations.CPU_PASS_TOKENS", 20)
        pack = pack_of(replace(job, gradient_accumulation_steps=1))
        passes: list[int] = []
        pack.loss.register_forward_pre_hook(lambda *_: passes.append(1))
        losses = [train_step(pack, {0: step}).losses[0] for step in range(8)]
    assert len(passes) > len(losses)
    return losses


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate wants them, the group is made here
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"  # no port to be taken by somebody else
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_WORKERS)
    precisions: tuple[Precision, ...] = ("fp32", "nf4")
    made = [train_together(job_with(f"{folder}/tiny", precision, 1, 2)) for precision in precisions]
    in_short_passes = train_in_short_passes(job_with(f"{folder}/tiny", "fp32", 2))
    torch.save([*made, in_short_passes], f"{folder}/losses-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_pack_over_two_workers_equals_each_run_alone(tmp_path: Path) -> None:
    folder = str(tiny_llama_folder(tmp_path / "tiny"))
    spawn(work, (str(tmp_path),), nprocs=NUM_WORKERS)  # type: ignore[no-untyped-call]
    for rank in range(NUM_WORKERS):
        *packs, in_short_passes = torch.load(tmp_path / f"losses-{rank}.pt")
        alone = pack_of(job_with(folder, "fp32", 2))
        expected = [train_step(alone, {0: step}).losses[0] for step in range(8)]
        assert in_short_passes == pytest.approx(expected, abs=1e-5)
        for precision, together in zip(("fp32", "nf4"), packs, strict=True):
            for seed, num_steps in ((1, 8), (2, 3), (3, 8)):
                job = job_with(folder, precision, seed)  # type: ignore[arg-type] # a Precision
                pack = pack_of(job)
                expected = [train_step(pack, {0: step}).losses[0] for step in range(num_steps)]
                if num_steps == 8:
                    expected += to_the_end(held_out_losses(pack, [0]))
                assert together[seed] == pytest.approx(expected, abs=1e-5), (precision, seed)
