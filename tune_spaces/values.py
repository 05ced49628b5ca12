"""What a hyperparameter may be: a few values, or a range; read from text and turned into Ray Tune's own domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import UserError

Value = float | int | str | bool


class BadSpace(UserError, ValueError):
    """A search space that cannot be searched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of a few values."""

    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Any number from `low` to `high`; "log" draws each power of ten as often as the next."""

    low: float
    high: float
    scale: Literal["log", "linear"] = "log"


Values = Choice | Range
Space = Mapping[str, Values]
"""By field; a field that is not in it keeps the plan's value."""


def read_values(field: str, text: str) -> Values:
    """Return what `text` says: `8` or `4,8,16` is a choice, `1e-5..1e-3` a range, on a log scale where it can be.

    Raises:
        BadSpace: It is neither.
    """
    low, dots, high = text.partition("..")
    if not dots:
        words = [word.strip() for word in text.split(",")]
        if not all(words):
            raise BadSpace(f"{field}={text!r} has an empty value; write {field}=4,8,16 or {field}=1e-5..1e-3.")
        return Choice(values=tuple(_value(word) for word in words))
    try:
        ends = float(low), float(high)
    except ValueError:
        raise BadSpace(f"{field}={text!r} is no range of numbers; write it as {field}=1e-5..1e-3.") from None
    if not ends[0] < ends[1]:
        raise BadSpace(f"{field}={text!r} is an empty range: {ends[0]:g} is not below {ends[1]:g}.")
    return Range(low=ends[0], high=ends[1], scale="log" if ends[0] > 0 else "linear")


def _value(word: str) -> Value:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def to_ray(space: Space) -> dict[str, Any]:
    """Return `space` in Ray Tune's terms."""
    from ray import tune

    domains: dict[str, Any] = {}
    for field, values in space.items():
        match values:
            case Choice():
                domains[field] = tune.choice(list(values.values))
            case Range(scale="log"):
                domains[field] = tune.loguniform(values.low, values.high)
            case Range():
                domains[field] = tune.uniform(values.low, values.high)
    return domains
