"""Which trials are made, and which are stopped: Ray Tune's searchers and schedulers by name."""

from collections.abc import Mapping
from typing import Any, Literal

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from tune_spaces.control import WithControl
from tune_spaces.points import MUTABLE, grid
from tune_spaces.values import Space, to_ray

SearcherName = Literal["random", "grid", "optuna"]
SchedulerName = Literal["asha", "median", "fifo", "pbt"]
REDUCTION_FACTOR = 4
"""Of the trials at a rung, one in so many goes on (ASHA's own default)."""


def searcher(
    name: SearcherName, space: Space, *, first_guess: Mapping[str, Any], max_concurrent: int, seed: int
) -> Searcher | SearchAlgorithm:
    """Return the searcher; `first_guess`, the plan's own choice, is the first trial.

    Raises:
        BadSpace: A grid over a range, which has no end.
    """
    if name == "optuna":
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(points_to_evaluate=[dict(first_guess)], seed=seed)
        return ConcurrencyLimiter(search, max_concurrent=max_concurrent)
    points = grid(space, first_guess) if name == "grid" else [dict(first_guess)]
    return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=max_concurrent, random_state=seed)


def scheduler(
    name: SchedulerName, space: Space, *, rungs: tuple[int, ...], control: Mapping[str, Any] | None
) -> TrialScheduler:
    """Return the scheduler; trials report at `rungs`, and the one with the values `control` goes to its end."""
    inner = _scheduler(name, space, rungs=rungs)
    return inner if control is None or name == "fifo" else WithControl(inner, control, is_hidden=name == "pbt")


def _scheduler(name: SchedulerName, space: Space, *, rungs: tuple[int, ...]) -> TrialScheduler:
    match name:
        case "asha":
            return ASHAScheduler(
                time_attr="step",
                grace_period=rungs[0],
                max_t=rungs[-1],
                reduction_factor=REDUCTION_FACTOR,
            )
        case "median":
            return MedianStoppingRule(time_attr="step", grace_period=rungs[0], min_samples_required=3)
        case "pbt":
            mutations = {field: values for field, values in space.items() if field in MUTABLE}
            return PopulationBasedTraining(
                time_attr="step",
                perturbation_interval=rungs[0],
                hyperparam_mutations=to_ray(mutations),
            )
        case "fifo":
            return FIFOScheduler()
