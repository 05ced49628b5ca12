"""One trial alone, as `train_jobs` runs it, in a process of its own: `python -m benchmarks.tuning_alone` and a JSON."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.training_run import peak_bytes
from benchmarks.tuning_search import MICRO_BATCH, SHIPPED


@dataclass(frozen=True, kw_only=True, slots=True)
class AloneNumbers:
    """What came of it."""

    losses: list[float]
    """Of each step."""
    tokens_per_s: float
    """With all threads; the first step is not timed."""
    peak_bytes: int
    """Largest resident size of the process."""


def run(model: str, point: dict[str, Any], num_steps: int) -> AloneNumbers:
    """Train the trial of `point` and return its numbers."""
    import torch

    from cluster.catalog import find
    from cluster.hardware import detect
    from cluster.models.base import load_base
    from cluster.plan import plan_training
    from train_jobs.arguments import Request
    from train_jobs.pack import build_pack
    from train_jobs.prepare import build_job, read_data
    from train_jobs.step import train_step
    from train_jobs.strategy import accelerator_for

    overrides = {field: str(value) for field, value in point.items()}
    overrides |= {"micro_batch_size": str(MICRO_BATCH), "gradient_accumulation_steps": "1"}
    request = Request(
        model=model,
        data=str(SHIPPED / "train.jsonl"),
        eval_data=str(SHIPPED / "heldout.jsonl"),
        name="alone",
        epochs=1.0,
        max_steps=num_steps,
        method=None,
        precision=None,
        max_length=None,
        train_on="all",
        num_workers=1,
        seed=0,
        overrides=overrides,
    )
    plan = plan_training(find(model), detect(), overrides=overrides, num_workers=1)
    job = build_job(request, plan, read_data(request, plan))
    torch.set_num_threads(plan.hardware.num_cpus)
    pack = build_pack(job, load_base(plan.card, precision=plan.precision).model, accelerator_for(job))
    steps = [train_step(pack, {0: step}) for step in range(num_steps)]
    timed = steps[1:]
    return AloneNumbers(
        losses=[step.losses[0] for step in steps],
        tokens_per_s=sum(step.num_tokens for step in timed) / sum(step.duration_s for step in timed),
        peak_bytes=peak_bytes(),
    )


def main() -> None:
    """Run and print the numbers as the last line."""
    asked = json.loads(sys.argv[1])
    print(json.dumps(asdict(run(asked["model"], asked["point"], asked["num_steps"]))))


if __name__ == "__main__":
    main()
