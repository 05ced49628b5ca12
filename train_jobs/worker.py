"""What each Ray Train worker runs."""

from dataclasses import dataclass, replace

import ray.train
import torch
from transformers.utils.logging import disable_progress_bar

from cluster.errors import UserError
from cluster.models.base import load_base
from train_jobs.job import TrainJob
from train_jobs.loop import DivergedError, Outcome, ResultNotKept, run
from train_jobs.pack import build_pack
from train_jobs.run_store import RunStore
from train_jobs.strategy import accelerator_for, loading_device


class RunNotVisible(RuntimeError):
    """A worker's node does not see where the run is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An error meant for the user. Returned, not raised: Ray would try again what fails again, and add a traceback."""

    message: str
    can_resume: bool
    """Whether the run may end well another time."""
    is_diverged: bool
    """Whether it is the loss that was refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a worker is told."""

    job: TrainJob
    run: RunStore
    num_workers: int
    """For which the job's `gradient_accumulation_steps` are meant; there may be others."""


def train_loop(config: dict[str, Assignment]) -> Outcome | Refusal:
    """Load the base, train the job's adapters on it and return how it went; rank 0's value reaches the driver."""
    assignment = config["assignment"]
    if not assignment.run.is_visible():
        raise RunNotVisible(
            f"{ray.util.get_node_ip_address()} does not see {assignment.run.uri}; give a folder that all nodes share, "
            "or a URI such as s3://bucket/runs: --storage."
        )
    context = ray.train.get_context()
    job = cut_for(assignment.job, assignment.num_workers, context.get_world_size())
    torch.set_num_threads(job.num_threads)
    disable_progress_bar()  # of loading weights, once per worker
    accelerator = accelerator_for(job)
    try:
        base = load_base(
            job.card,
            precision=job.precision,
            compute_dtype=getattr(torch, job.compute_dtype),
            device=loading_device(job, accelerator),
        )
        pack = build_pack(job, base.model, accelerator)
        return run(pack, base.tokenizer, assignment.run)
    except UserError as error:
        return Refusal(
            message=str(error),
            can_resume=isinstance(error, ResultNotKept),
            is_diverged=isinstance(error, DivergedError),
        )


def cut_for(job: TrainJob, planned: int, num_workers: int) -> TrainJob:
    """Return `job`, planned for `planned` workers, for another number of them: a step trains on the same samples.

    Where the workers do not divide the micro-batches, these become smaller.
    """
    return replace(job, gradient_accumulation_steps=-(-job.gradient_accumulation_steps * planned // num_workers))
