"""From the moment a trial is wanted to its first step, as Ray Tune sees it."""

import time
from collections import deque
from typing import Any

from ray.tune import Callback

FIRST_STEP_AT = "first_step_at"
"""The metric in which a trial tells when its first step was made, in seconds since the epoch."""
FIRST_STEP_S = "first_step_s"
"""What that step took; the peer's trials do not tell."""


class TrialClock(Callback):  # type: ignore[misc]
    """A trial is wanted when the one before it in its place has ended. The first ones wait for more than a place."""

    def __init__(self) -> None:
        self.first_step_s: list[float] = []
        """Until the first step was made."""
        self.begun_s: list[float] = []
        """Until it began, where trials tell what it took."""
        self._freed: deque[float] = deque()
        self._wanted: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        """Match the trial with the place that became free first."""
        if self._freed and trial.trial_id not in self._wanted:
            self._wanted[trial.trial_id] = self._freed.popleft()

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        """Count the trial once, at its first report."""
        if (wanted := self._wanted.pop(trial.trial_id, None)) is not None:
            self.first_step_s.append(result[FIRST_STEP_AT] - wanted)
            if FIRST_STEP_S in result:
                self.begun_s.append(self.first_step_s[-1] - result[FIRST_STEP_S])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        """Note that a place is free."""
        self._freed.append(time.time())
