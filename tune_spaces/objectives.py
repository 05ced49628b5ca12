"""What a search makes small or large: one objective, or several and the trials that no other beats in all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tune_spaces.values import BadSpace


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A metric that trials report."""

    name: str
    mode: Literal["min", "max"]
    meaning: str
    """Whether it is measured or computed, and of what."""


OBJECTIVES: Mapping[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(name="held_out_loss", mode="min", meaning="measured: mean loss over the held-out trained tokens"),
        Objective(name="exact_match", mode="max", meaning="measured: share of held-out answers that are right"),
        Objective(name="adapter_bytes", mode="min", meaning="counted: the adapter's weights in fp32"),
        Objective(
            name="latency_ratio",
            mode="min",
            meaning="modelled: bytes of weights that a generated token reads, over those of the bare base",
        ),
    )
}
MEASURED = ("held_out_loss", "exact_match")
"""What training changes; a search is for one of these first."""


def read_objectives(text: str) -> tuple[str, ...]:
    """Return the names in `text`, separated by commas; the first is what trials are compared by while they run.

    Raises:
        BadSpace: One is unknown or there twice, or the first is the same in all trials of the same shape.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in OBJECTIVES:
            raise BadSpace(f"There is no objective {name!r}; choose from {', '.join(OBJECTIVES)}.")
        if names.count(name) > 1:
            raise BadSpace(f"{name} is there twice in --objective {text}.")
    if names[0] not in MEASURED:
        raise BadSpace(f"--objective {text}: training does not change {names[0]}; begin with {' or '.join(MEASURED)}.")
    return names


def latency_ratio(*, weight_bytes: int, adapter_bytes: int) -> float:
    """Return the modelled time of a generated token over that of the bare base.

    Generating one token for one request reads every weight once and computes little, so time goes with the bytes
    (arXiv:2211.05102, section 2.1); what a batch shares, and the launches of small kernels, are left out.
    """
    return (weight_bytes + adapter_bytes) / weight_bytes


def badness(names: Sequence[str], metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the objectives of one trial, turned so that small is good."""
    return tuple(float(metrics[name]) * (1 if OBJECTIVES[name].mode == "min" else -1) for name in names)


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the points that no other is at least as small as in everything, and smaller in something."""

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def chosen(points: Sequence[tuple[float, ...]], *, within: float) -> int:
    """Return the point of the front to keep: of those at most the share `within` worse than the best in the first
    objective, the best in the second, then the third, and last in the first.

    With 0 it is the best in the first objective, the others deciding between equals.

    Raises:
        ValueError: There is no point.
    """
    best = min(point[0] for point in points)
    limit = best + within * abs(best)
    near = [i for i in pareto(points) if points[i][0] <= limit]
    return min(near, key=lambda i: (*points[i][1:], points[i][0]))
