"""What a search may cost, what it will cost, and when it cannot even begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.plan import TrainingPlan
from tune_spaces.text import in_words

if TYPE_CHECKING:  # it imports torch
    from train_jobs.job import TrainJob

GPU_FLOPS = 2.5e15
"""No GPU of the catalogue does more dense bf16 operations a second."""
CORE_FLOPS = {"float32": 3e11}
OTHER_CORE_FLOPS = 1e13
"""No core does more: two AVX-512 units at 4.5 GHz in fp32, AMX tiles in 16 bits."""
FLOP_PER_WEIGHT = 4
"""Per trained token on a frozen base: two forward, two for the gradient of the activations (arXiv:2106.09685)."""


class BudgetTooSmall(UserError, ValueError):
    """A budget in which no trial comes far enough to be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The bounds on what a search may spend; None where there is none."""

    max_time_s: float | None
    max_gpu_hours: float | None

    def limit_s(self, num_workers: int) -> float | None:
        """Return the tighter of both bounds as time; GPU hours are spent by all workers together."""
        by_hours = None if self.max_gpu_hours is None else self.max_gpu_hours * 3600 / num_workers
        bounds = [bound for bound in (self.max_time_s, by_hours) if bound is not None]
        return min(bounds) if bounds else None

    def __str__(self) -> str:
        """Return the options that the user gave."""
        words = [] if self.max_time_s is None else [f"--max-time {in_words(self.max_time_s)}"]
        words += [] if self.max_gpu_hours is None else [f"--max-gpu-hours {self.max_gpu_hours:g}"]
        return " ".join(words)


def ensure_a_step(budget: Budget, plan: TrainingPlan, job: "TrainJob", *, num_workers: int) -> None:
    """Check that a step of one trial could fit, by what its products cost on the fastest machine there is.

    Raises:
        BudgetTooSmall: It cannot.
    """
    limit_s = budget.limit_s(num_workers)
    least_s = least_step_s(plan, job)
    if limit_s is not None and limit_s < least_s:
        raise BudgetTooSmall(
            f"{budget} is {limit_s:.2g} s, and one step of one trial takes at least {least_s:.2g} s; "
            f"a trial has {job.adapters[0].num_steps} steps. Give more."
        )


def least_step_s(plan: TrainingPlan, job: "TrainJob") -> float:
    """Return a time that one step of one trial cannot be shorter than."""
    tokens = job.batch_size * sum(len(sample.input_ids) for sample in job.samples) / len(job.samples)
    per_core = CORE_FLOPS.get(job.compute_dtype, OTHER_CORE_FLOPS)
    flops = GPU_FLOPS if plan.hardware.gpu else plan.hardware.num_cpus * per_core
    return FLOP_PER_WEIGHT * plan.card.num_active_parameters() * tokens / flops


def expected_steps(rungs: Sequence[int], *, num_trials: int, reduction_factor: int | None, num_kept: int = 0) -> int:
    """Return the optimizer steps of all trials together: all to the end, or one in `reduction_factor` at each rung.

    `num_kept` of them go to the end whatever the others do: the trial of the plan's own values, to compare with.
    """
    if reduction_factor is None:
        return num_trials * rungs[-1]
    steps, before, left = num_kept * rungs[-1], 0, num_trials - num_kept
    for rung in rungs:
        steps += left * (rung - before)
        before, left = rung, max(min(left, 1), left // reduction_factor)
    return steps
