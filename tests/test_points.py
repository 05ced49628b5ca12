"""Which points are tried, and in which order."""

import pytest

from tune_spaces.points import check_methods, first_guess, grid, num_points
from tune_spaces.values import BadSpace, Choice, Range, Space

SPACE: Space = {"r": Choice(values=(4, 8)), "targets": Choice(values=("attention", "all"))}


def test_a_grid_is_every_point_once_and_the_first_guess_before_the_others() -> None:
    points = grid(SPACE, {"r": 8, "targets": "all"})
    assert points[0] == {"r": 8, "targets": "all"}
    assert sorted((p["r"], p["targets"]) for p in points) == [
        (4, "all"),
        (4, "attention"),
        (8, "all"),
        (8, "attention"),
    ]
    assert num_points(SPACE, searcher="grid", trials=99) == 4
    assert num_points(SPACE, searcher="random", trials=99) == 99


def test_the_first_guess_is_the_plans_own_or_the_nearest_there_is() -> None:
    space: Space = {**SPACE, "learning_rate": Range(low=1e-4, high=1e-3), "use_rslora": Choice(values=(True,))}
    default = {"r": 8, "targets": "all", "learning_rate": 2e-4, "use_rslora": True}
    assert first_guess(space, default) == default
    far = {"r": 64, "targets": "all", "learning_rate": 1.0, "use_rslora": False}
    assert first_guess(space, far) == {"r": 8, "targets": "all", "learning_rate": 1e-3, "use_rslora": True}


def test_population_based_training_needs_something_that_may_change() -> None:
    with pytest.raises(
        BadSpace, match="pbt changes learning_rate or weight_decay in mid-run, and the space has neither"
    ):
        check_methods(SPACE, searcher="random", scheduler="pbt")
    check_methods({**SPACE, "weight_decay": Choice(values=(0.0, 0.1))}, searcher="random", scheduler="pbt")
    check_methods(SPACE, searcher="grid", scheduler="asha")
