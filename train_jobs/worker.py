"""What each Ray Train worker runs."""

from dataclasses import dataclass

import torch
from transformers.utils.logging import disable_progress_bar

from cluster.errors import UserError
from cluster.models.base import load_base
from train_jobs.job import TrainJob
from train_jobs.loop import Outcome, run
from train_jobs.pack import build_pack
from train_jobs.strategy import accelerator_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An error meant for the user. Returned, not raised: Ray would try again what fails again, and add a traceback."""

    message: str


def train_loop(config: dict[str, TrainJob]) -> Outcome | Refusal:
    """Load the base, train the job's adapters on it and return how it went; rank 0's value reaches the driver."""
    job = config["job"]
    torch.set_num_threads(job.num_threads)
    disable_progress_bar()  # of loading weights, once per worker
    accelerator = accelerator_for(job)
    try:
        base = load_base(
            job.card,
            precision=job.precision,
            compute_dtype=getattr(torch, job.compute_dtype),
            device=accelerator.device,
        )
        pack = build_pack(job, base.model, accelerator)
        return run(pack, base.tokenizer)
    except UserError as error:
        return Refusal(message=str(error))
