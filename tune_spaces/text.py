"""Values of trials, and times, as people read them."""

from collections.abc import Mapping
from typing import Any


def words(config: Mapping[str, Any]) -> str:
    """Return the values of a trial in one line."""
    return " ".join(f"{field}={short(value)}" for field, value in config.items())


def short(value: Any) -> str:
    """Return a value as it is written in a table."""
    if isinstance(value, float):
        return f"{value:.2e}" if value and (abs(value) < 0.01 or abs(value) >= 1000) else f"{value:.4g}"
    return str(value)


def in_words(seconds: float) -> str:
    """Return a time as a person would say it, and as `--max-time` reads it."""
    if seconds < 120:
        return f"{seconds:.0f}s" if seconds >= 10 else f"{seconds:.3g}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 120 else f"{minutes // 60}h{minutes % 60:02}m"
