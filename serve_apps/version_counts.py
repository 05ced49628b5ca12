"""How often and how fast each version answered, since this process began: what a canary is judged by."""

import math
import random
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from serve_apps.call import Call

SAMPLE_SIZE = 256
"""Times kept of each kind. The 90th percentile of so many is off by 2 percentiles (binomial: sqrt(.9 x .1 / 256))."""
MAX_VERSIONS = 4096
"""Versions with counts, of some 6 KiB each; the one that was asked least recently is forgotten."""
PERCENTILES = (50, 90, 99)

Key = tuple[str, str | None, int | None]


class Sample:
    """A fair sample of all values there were, of fixed size (Vitter's algorithm R, doi:10.1145/3147.3165)."""

    def __init__(self) -> None:
        self._values = array("d")
        self._num_seen = 0

    def add(self, value: float) -> None:
        """Let one more value take part."""
        self._num_seen += 1
        if len(self._values) < SAMPLE_SIZE:
            self._values.append(value)
        elif (place := random.randrange(self._num_seen)) < SAMPLE_SIZE:  # noqa: S311 (no secret)
            self._values[place] = value

    def percentiles(self) -> dict[str, float] | None:
        """Return the smallest value that is not below p% of the sample, for each p; None of nothing."""
        ascending = sorted(self._values)
        if not ascending:
            return None
        return {f"p{p}": ascending[math.ceil(p / 100 * len(ascending)) - 1] for p in PERCENTILES}


@dataclass(kw_only=True, slots=True)
class Tally:
    """The answers of one version."""

    num_requests: int = 0
    num_errors: int = 0
    """Answers with a status of 400 and above, the client's own mistakes included."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    seconds: Sample = field(default_factory=Sample)
    """From arrival to the last byte, of answers that are no errors."""
    first_token_s: Sample = field(default_factory=Sample)
    """From arrival to the first text, of streams."""
    token_s: Sample = field(default_factory=Sample)
    """Per token after the first, of streams."""

    def add(self, call: Call) -> None:
        """Count one answer."""
        self.num_requests += 1
        if call.status >= 400:
            self.num_errors += 1
            return
        self.num_prompt_tokens += call.num_prompt_tokens
        self.num_completion_tokens += call.num_completion_tokens
        self.seconds.add(call.seconds)
        if call.is_stream and call.first_token_s is not None:
            self.first_token_s.add(call.first_token_s)
            if call.num_completion_tokens > 1:
                self.token_s.add((call.seconds - call.first_token_s) / (call.num_completion_tokens - 1))

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and percentiles of the times."""
        counts = ("num_requests", "num_errors", "num_prompt_tokens", "num_completion_tokens")
        times = ("seconds", "first_token_s", "token_s")
        return {name: getattr(self, name) for name in counts} | {n: getattr(self, n).percentiles() for n in times}


class VersionCounts:
    """Tallies by model, adapter and version; an observer of `CallMiddleware`."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[Key, Tally] = OrderedDict()  # the least recently asked first

    def observe(self, call: Call) -> None:
        """Count a request that is over, if it reached a model."""
        if call.model is None or call.error_code == "model_not_found":
            return
        key = (call.model, call.adapter, call.version)
        self._tallies.setdefault(key, Tally()).add(call)
        self._tallies.move_to_end(key)
        if len(self._tallies) > MAX_VERSIONS:
            self._tallies.popitem(last=False)

    def of(self, model: str, adapter: str | None) -> list[dict[str, Any]]:
        """Return what each version of the adapter, or the bare base with None, answered so far, by number."""
        found = [(v or 0, tally) for (m, a, v), tally in list(self._tallies.items()) if (m, a) == (model, adapter)]
        return [{"version": v, **tally.to_json()} for v, tally in sorted(found, key=lambda item: item[0])]
