"""How long a search may run, and what it will cost."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The bound on a search's time; None where there is none."""

    max_time_s: float | None


def budget_of(*, max_time_s: float | None, max_gpu_hours: float | None, num_workers: int) -> Budget:
    """Return the tighter of both bounds: `max_gpu_hours` is spent by all workers together."""
    by_hours = None if max_gpu_hours is None else max_gpu_hours * 3600 / num_workers
    bounds = [bound for bound in (max_time_s, by_hours) if bound is not None]
    return Budget(max_time_s=min(bounds) if bounds else None)


def predicted_s(step_s: float, *, num_steps_each: int, num_trials: int, num_slots: int, num_workers: int) -> float:
    """Return the time of a whole search without early stopping: rounds of full packs, each of `num_steps_each` steps.

    `step_s` is one measured step of a full pack; a last round that is not full takes its share of one.
    """
    rounds = num_trials / (num_slots * num_workers)
    return rounds * num_steps_each * step_s
