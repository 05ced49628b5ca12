"""What our searches say while they run, with the clock in it that the peer's trials are timed by."""

from typing import Any, ClassVar

from benchmarks.tuning_clock import TrialClock
from tune_spaces.watch import Watch


class ClockedWatch(Watch):
    """Takes the place of `Watch` in the one search of a process."""

    clock: ClassVar[TrialClock] = TrialClock()

    def on_trial_start(self, *arguments: Any, **named: Any) -> None:
        """Pass on to both."""
        self.clock.on_trial_start(*arguments, **named)
        super().on_trial_start(*arguments, **named)

    def on_trial_result(self, *arguments: Any, **named: Any) -> None:
        """Pass on to both."""
        self.clock.on_trial_result(*arguments, **named)
        super().on_trial_result(*arguments, **named)

    def on_trial_complete(self, *arguments: Any, **named: Any) -> None:
        """Pass on to both."""
        self.clock.on_trial_complete(*arguments, **named)
        super().on_trial_complete(*arguments, **named)
