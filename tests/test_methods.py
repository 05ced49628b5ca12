"""Searchers propose the plan's own values first, and the same points for the same seed."""

from collections.abc import Callable
from typing import Any

import pytest
from ray.tune.experiment import Experiment, Trial
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from tune_spaces.halving import rungs
from tune_spaces.methods import SearcherName, scheduler, searcher
from tune_spaces.values import Choice, Range, Space, to_ray

SPACE: Space = {"r": Choice(values=(4, 8, 16)), "learning_rate": Range(low=1e-5, high=1e-3)}
GRID: Space = {"r": Choice(values=(4, 8, 16)), "learning_rate": Choice(values=(1e-4, 1e-3))}
GUESS = {"r": 8, "learning_rate": 1e-4}
Points = list[dict[str, Any]]


def bowl(point: dict[str, Any]) -> float:
    return float(abs(point["r"] - 16) + abs(point["learning_rate"] - 5e-4) * 1e4)


def proposed(name: SearcherName, space: Space, *, seed: int, count: int) -> Points:
    """Return what a searcher proposes, told after each point how it did."""
    made = searcher(name, space, first_guess=GUESS, max_concurrent=count, seed=seed)
    if isinstance(made, BasicVariantGenerator):
        made.add_configurations(Experiment("x", "none", config=to_ray(space), num_samples=count))
        trials = [made.next_trial() for _ in range(count)]
        assert all(isinstance(trial, Trial) for trial in trials)
        return [trial.config for trial in trials]
    assert isinstance(made, ConcurrencyLimiter)
    made.set_search_properties("loss", "min", to_ray(space))
    points: Points = []
    for i in range(count):
        point = made.suggest(str(i))
        points.append(dict(point))
        made.on_trial_complete(str(i), {"loss": bowl(point), "training_iteration": 1})
    return points


@pytest.fixture(autouse=True, scope="module")
def _known_trainable() -> None:
    from ray.tune.registry import register_trainable

    register_trainable("none", print)


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_the_plans_own_values_come_first_and_the_same_seed_gives_the_same_points(name: SearcherName) -> None:
    points = proposed(name, SPACE, seed=1, count=8)
    assert points[0] == GUESS
    assert points == proposed(name, SPACE, seed=1, count=8)
    assert points[1:] != proposed(name, SPACE, seed=2, count=8)[1:]
    assert all(point["r"] in (4, 8, 16) and 1e-5 <= point["learning_rate"] <= 1e-3 for point in points)


def test_a_grid_begins_with_the_plans_own_values_and_tries_each_point_once() -> None:
    points = proposed("grid", GRID, seed=1, count=6)
    assert points[0] == GUESS
    assert {(p["r"], p["learning_rate"]) for p in points} == {(r, lr) for r in (4, 8, 16) for lr in (1e-4, 1e-3)}


def test_optuna_learns_from_what_trials_reported() -> None:
    points = proposed("optuna", SPACE, seed=3, count=60)
    early, late = points[1:21], points[40:]
    mean: Callable[[Points], float] = lambda some: sum(map(bowl, some)) / len(some)  # noqa: E731
    assert mean(late) < mean(early)


@pytest.mark.parametrize("num_warmup_steps", [0, 2, 7])
def test_no_trial_is_stopped_before_its_warm_up_has_ended(num_warmup_steps: int) -> None:
    steps = rungs(64, first=max(num_warmup_steps + 1, 4), reduction_factor=4)
    made = scheduler("asha", SPACE, rungs=steps, control=None)
    made.set_search_properties("loss", "min")
    trials = [Trial("none", stub=True) for _ in range(8)]
    for trial in trials:
        made.on_trial_add(None, trial)
    for step in range(1, num_warmup_steps + 1):
        said = {
            made.on_trial_result(None, trial, {"step": step, "training_iteration": step, "loss": float(i)})
            for i, trial in enumerate(trials)
        }
        assert said == {made.CONTINUE}
    assert steps[-1] == 64
