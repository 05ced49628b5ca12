"""Trials at their rung: measured together, then released to Ray Tune one after the other."""

import time
from collections import deque
from collections.abc import Generator, Sequence

from train_jobs.evaluate import held_out_losses
from train_jobs.pack import Pack
from tune_spaces.halving import release_order
from tune_spaces.trial import DIVERGED_LOSS, Trial, TrialReport

LATE_S = 1.0
"""When the next trial reports, though Ray Tune has yet to say what becomes of the one before."""


class Arrivals:
    """From the last step of a round to the reports of those that have made the steps they were asked for."""

    def __init__(self, *, reduction_factor: int) -> None:
        self._reduction_factor = reduction_factor
        self._together: list[Trial] = []
        """Being measured."""
        self._passes: Generator[None, None, list[float]] | None = None
        self._measured: deque[tuple[Trial, TrialReport]] = deque()
        """In the order in which they are to report."""
        self._last: Trial | None = None
        """Of those that have reported, the one that Ray Tune has yet to hear."""
        self._released_s = 0.0

    @property
    def is_measuring(self) -> bool:
        """Return whether there is something to `measure`."""
        return bool(self._together)

    def __len__(self) -> int:
        """Return how many have yet to report, those that are being measured left out."""
        return len(self._measured)

    def add(self, trials: Sequence[Trial]) -> None:
        """Take those that have arrived in one round; all before them have been measured."""
        self._together = list(trials)

    def hear(self, trial: Trial) -> None:
        """Note what became of the trial: it goes on, or has left its place."""
        if trial is self._last:
            self._last = None

    def drop(self, trial: Trial) -> None:
        """Forget a trial that has left."""
        self.hear(trial)
        self._measured = deque(entry for entry in self._measured if entry[0] is not trial)
        if trial in self._together:
            self._together.remove(trial)
            self._passes = None  # it begins anew, without the slot that is empty now

    def measure(self, pack: Pack) -> None:
        """Make one pass over held-out samples, and after the last one tell in which order trials report."""
        sound = [trial for trial in self._together if trial.losses[-1] < DIVERGED_LOSS]
        if self._passes is None:
            self._passes = held_out_losses(pack, [trial.slot for trial in sound])
        try:
            next(self._passes)
        except StopIteration as stop:
            self._line_up({trial.slot: loss for trial, loss in zip(sound, stop.value, strict=True)})
        except (RuntimeError, ArithmeticError) as error:  # out of memory, above all
            for trial in self._together:
                trial.fail(error)
            self._together, self._passes = [], None

    def _line_up(self, losses: dict[int, float]) -> None:
        held_out = [min(losses.get(trial.slot, DIVERGED_LOSS), DIVERGED_LOSS) for trial in self._together]
        for index in release_order(held_out, reduction_factor=self._reduction_factor):
            trial = self._together[index]
            self._measured.append((trial, trial.report(held_out[index])))
        self._together, self._passes = [], None

    def release(self) -> None:
        """Let the next trial report, once the one before has been heard or is late.

        Schedulers see them in order; and who is to take the place of one that ends makes its first step before more
        places are given, since trials that come at once wait for each other.
        """
        is_late = time.monotonic() - self._released_s > LATE_S
        if self._measured and (self._last is None or is_late):
            self._last, report = self._measured.popleft()
            self._released_s = time.monotonic()
            self._last.tell(report)
