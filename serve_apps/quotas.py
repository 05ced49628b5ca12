"""Requests and tokens per minute, and requests at a time, of one key: when more may come, and what is left."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_apps.refusals import Refusal

MAX_ONGOING = 256
"""Requests to models that the ingress answers at a time, of all keys. Each holds its body, an answer's buffers and two
actor calls, some hundred KiB; and as many may wait for a model with room (`ModelArgs.max_queued_requests`)."""
MAX_ONGOING_PER_KEY = MAX_ONGOING // 2
"""So that one key alone never shuts out the others."""
BUSY_RETRY_AFTER_S = 1
"""Nobody knows when an answer ends; somebody's does soon where so many run."""
MINUTE_S = 60.0


@dataclass(slots=True)
class Bucket:
    """A token bucket (RFC 2697's committed burst): holds one minute's worth, and fills at that rate.

    So a minute's worth may come at once, and over any t minutes no more than (t + 1) x `per_minute` is let in.
    """

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    """Seconds."""
    _level: float = field(init=False)
    _read_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._level = float(self.per_minute)
        self._read_s = self.clock()

    @property
    def level(self) -> float:
        """What may be taken now; below zero after more was used than there was."""
        now_s = self.clock()
        self._level = min(self.per_minute, self._level + (now_s - self._read_s) * self.per_minute / MINUTE_S)
        self._read_s = now_s
        return self._level

    def wait_s(self, amount: float) -> float:
        """Return the seconds until `amount` could be taken; what is more than a full bucket waits for a full one."""
        missing_s = (min(amount, self.per_minute) - self.level) * MINUTE_S / self.per_minute
        return max(0.0, round(missing_s, 6))  # whoever waits as long as we said is not refused for a rounding error

    def take(self, amount: float) -> None:
        """Take `amount`, whether it is there or not; a negative one puts back."""
        self._level = min(self.per_minute, self.level - amount)


@dataclass(slots=True)
class Quota:
    """The two buckets of one key, where it has limits, and its requests under way."""

    requests: Bucket | None
    tokens: Bucket | None
    num_ongoing: int = 0

    def admit(self) -> None:
        """Take one request; raises `Refusal` (429) if none is left, or if the tokens are used up."""
        for bucket, amount, what in ((self.requests, 1, "requests"), (self.tokens, 1, "tokens")):
            _refuse_unless(bucket, amount, what)
        if self.requests:
            self.requests.take(1)

    def reserve(self, num_tokens: int) -> int:
        """Take the most that an answer may use, and return what was taken; raises `Refusal` (429).

        A request that may use more than a minute's worth needs a full bucket.
        """
        if self.tokens is None:
            return 0
        reserved = min(num_tokens, self.tokens.per_minute)
        _refuse_unless(self.tokens, reserved, "tokens")
        self.tokens.take(reserved)
        return reserved

    def settle(self, *, reserved: int, used: int) -> None:
        """Take what was used in place of what was reserved; more than there was is paid back by waiting."""
        if self.tokens is not None:
            self.tokens.take(used - reserved)

    def headers(self) -> dict[str, str]:
        """Return OpenAI's `x-ratelimit-*` headers for the limits there are."""
        found: dict[str, str] = {}
        for bucket, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if bucket is not None:
                found[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_s(bucket.per_minute):.3f}s"
        return found


def _refuse_unless(bucket: Bucket | None, amount: float, what: str) -> None:
    if bucket is None or (wait_s := bucket.wait_s(amount)) <= 0:
        return
    raise Refusal(
        f"This key's limit of {bucket.per_minute} {what} per minute is reached; try again in {math.ceil(wait_s)} s.",
        code="rate_limit_exceeded",
        status=429,
        retry_after_s=math.ceil(wait_s),
    )


def busy(message: str) -> Refusal:
    """Return the refusal of a request for which there is no place at the moment."""
    return Refusal(message, code="rate_limit_exceeded", status=429, retry_after_s=BUSY_RETRY_AFTER_S)
