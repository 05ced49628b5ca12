"""What trials gain by sharing a base, without Ray: `python -m benchmarks.tuning_gain '{...}'` prints the rates.

K = trials in the pack.
"""

import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from cluster.catalog import find
from cluster.models.adapter_spec import AdapterSpec
from cluster.models.base import load_base
from train_jobs.job import AdapterJob, TrainJob
from train_jobs.pack import Pack, PackSize, build_pack
from train_jobs.step import train_step
from train_jobs.tokens import IGNORED, Sample

RANKS = (4, 8, 32, 64)
"""Of the trials, in turn: those of the search that is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GainSettings:
    """What is measured in one process."""

    model: str
    precision: str
    micro_batch_size: int
    tokens_per_row: int
    num_trials: list[int]
    """One pack after the other; 1 is a trial alone."""
    num_steps: int
    """Of each pack in a round; the first one is not timed."""
    num_rounds: int
    """Of all packs in turn: a machine is not as fast at every minute."""
    num_threads: int


def measure(settings: GainSettings) -> dict[int, list[float]]:
    """Return the trained tokens per second of each pack, in each round."""
    torch.set_num_threads(settings.num_threads)
    disable_progress_bar()
    card = find(settings.model)
    job = job_of(settings)
    size = PackSize(num_slots=max(settings.num_trials), max_r=max(RANKS), target_modules=card.target_modules)
    base = load_base(card, precision=settings.precision)  # type: ignore[arg-type]
    pack = build_pack(job, base.model, Accelerator(cpu=not torch.cuda.is_available()), size=size)
    num_tokens = settings.micro_batch_size * settings.tokens_per_row
    rates: dict[int, list[float]] = {count: [] for count in settings.num_trials}
    for _ in range(settings.num_rounds):
        for count, of_count in rates.items():
            seconds = _seconds(pack, settings, [RANKS[slot % len(RANKS)] for slot in range(count)])
            if count == 1:  # with each rank, since packs hold all of them
                seconds = statistics.mean([seconds, *(_seconds(pack, settings, [r]) for r in RANKS[1:])])
            of_count.append(count * num_tokens / seconds)
    return rates


def _seconds(pack: Pack, settings: GainSettings, ranks: Sequence[int]) -> float:
    """Return the time of a step of trials with these `ranks` together."""
    for slot, r in enumerate(ranks):
        pack.enter(slot, adapter_of(settings, r, seed=slot))
    steps = [train_step(pack, dict.fromkeys(range(len(ranks)), step)) for step in range(settings.num_steps)]
    for slot in range(len(ranks)):
        pack.leave(slot)
    return statistics.median(step.duration_s for step in steps[1:])


def job_of(settings: GainSettings) -> TrainJob:
    """Return a job of random samples of one length, which have nothing in common; a third of each is trained."""
    chooser = random.Random(0)  # noqa: S311 -- tokens, not secrets
    samples = []
    for _ in range(4 * settings.micro_batch_size):
        ids = tuple(chooser.randrange(1000, 40_000) for _ in range(settings.tokens_per_row))
        first = 2 * len(ids) // 3
        samples.append(Sample(input_ids=ids, labels=(IGNORED,) * first + ids[first:]))
    return TrainJob(
        card=find(settings.model),
        precision=settings.precision,  # type: ignore[arg-type]
        compute_dtype="float32",
        adapters=(),
        samples=samples,
        held_out=(),
        questions=(),
        batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        deepspeed_zero=None,
        checkpoint_steps=settings.num_steps,
        num_threads=settings.num_threads,
    )


def adapter_of(settings: GainSettings, r: int, *, seed: int) -> AdapterJob:
    """Return one trial."""
    return AdapterJob(
        spec=AdapterSpec(r=r, lora_alpha=2 * r, target_modules=find(settings.model).target_modules),
        seed=seed,
        num_steps=settings.num_steps,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        num_warmup_steps=0,
    )


def main() -> None:
    """Measure and print the numbers as the last line."""
    print(json.dumps(measure(GainSettings(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
