"""What trials must have in common to go through the base in one pass; those of another shape have passes of their own.

A worker's base, its slots and its memory are shared by trials of all shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from cluster.plan import TrainingPlan
from tune_spaces.values import Choice, Space

if TYPE_CHECKING:  # it imports torch
    from train_jobs.job import TrainJob
    from train_jobs.tokens import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The batch of a trial, and how long its samples may be."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    """Tokens; the held-out part is cut at the plan's, for all trials."""


SHAPE_FIELDS = tuple(field.name for field in fields(Shape))


def shape_of_plan(plan: TrainingPlan) -> Shape:
    """Return the plan's own shape."""
    return Shape(
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        max_length=plan.max_length,
    )


def shape_of(own: Shape, config: Mapping[str, Any]) -> Shape:
    """Return the shape of a trial with the values `config`, on a plan with the shape `own`."""
    return replace(own, **{field: int(config[field]) for field in SHAPE_FIELDS if field in config})


def shapes_of(own: Shape, space: Space) -> list[Shape]:
    """Return every shape that a trial of `space` may have, `own` first."""
    varied = {f: values.values for f, values in space.items() if f in SHAPE_FIELDS and isinstance(values, Choice)}
    points = [dict(zip(varied, point, strict=True)) for point in product(*varied.values())]
    return list(dict.fromkeys([own, *(shape_of(own, point) for point in points)]))


def longest_of(space: Space) -> int | None:
    """Return the largest `max_length` in a space; None where it has none that could be one."""
    values = space.get("max_length")
    numbers = [value for value in values.values if isinstance(value, int)] if isinstance(values, Choice) else []
    return max(numbers, default=None)


def job_of_shape(
    job: "TrainJob", shape: Shape, samples: Mapping[int, "Sequence[Sample]"], *, num_workers: int
) -> "TrainJob":
    """Return `job` with the batches of `shape`; `samples` are by `max_length`. Number of steps and schedule stay."""
    return replace(
        job,
        batch_size=shape.micro_batch_size * shape.gradient_accumulation_steps * num_workers,
        gradient_accumulation_steps=shape.gradient_accumulation_steps,
        samples=samples[shape.max_length],
    )
