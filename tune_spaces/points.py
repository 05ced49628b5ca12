"""The points of a space that are tried: the plan's own first, a grid, and what a method cannot do with a space."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from tune_spaces.values import BadSpace, Choice, Space

MUTABLE = frozenset({"learning_rate", "weight_decay"})
"""What population-based training may change in mid-run: all else shapes the adapter or its schedule."""
MAX_GRID = 10_000
"""Points; a larger grid is a mistake."""


def first_guess(space: Space, default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the point of `space` nearest to the plan's own choice; exactly that, wherever the space holds it."""
    guess: dict[str, Any] = {}
    for field, values in space.items():
        wanted = default[field]
        if isinstance(values, Choice):
            guess[field] = wanted if wanted in values.values else _nearest(values, wanted)
        else:
            guess[field] = min(max(wanted, values.low), values.high)
    return guess


def _nearest(values: Choice, wanted: Any) -> Any:
    if isinstance(wanted, str | bool):
        return values.values[0]
    return min(values.values, key=lambda value: abs(float(value) - float(wanted)))


def grid(space: Space, first: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every point of `space`, `first` before the others.

    Raises:
        BadSpace: A field is a range, which has no end, or there are more than `MAX_GRID` points.
    """
    choices = _choices(space)
    points = [dict(zip(choices, point, strict=True)) for point in product(*(c.values for c in choices.values()))]
    return [dict(first), *(point for point in points if point != first)]


def _choices(space: Space) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}
    for field, values in space.items():
        if not isinstance(values, Choice):
            raise BadSpace(f"a grid cannot go over the range of {field}; give values: --set-space {field}=1e-4,1e-3.")
        choices[field] = values
    num_points = math.prod(len(values.values) for values in choices.values())
    if num_points > MAX_GRID:
        raise BadSpace(f"The grid has {num_points} points, at most {MAX_GRID} are tried; give fewer values.")
    return choices


def num_points(space: Space, *, searcher: str, trials: int) -> int:
    """Return how many points are tried: all of a grid, else as many as were asked for.

    Raises:
        BadSpace: A grid that has no end.
    """
    return math.prod(len(values.values) for values in _choices(space).values()) if searcher == "grid" else trials


def check_methods(space: Space, *, searcher: str, scheduler: str) -> None:
    """Check that the searcher and the scheduler can do this together, on this space.

    Raises:
        BadSpace: They cannot.
    """
    if scheduler != "pbt":
        return
    if searcher != "random":
        raise BadSpace(f"--scheduler pbt moves trials through the space itself; it goes with random, not {searcher}.")
    if not MUTABLE & set(space):
        raise BadSpace(f"pbt changes {' or '.join(sorted(MUTABLE))} in mid-run, and the space has neither.")
