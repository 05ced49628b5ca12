"""Which trials of a worker make their next step together: round by round, in passes, newcomers first."""

from collections.abc import Collection, Iterable, Sequence

from cluster.activations import PASS_TOKENS
from train_jobs.batches import passes_of
from train_jobs.step import pass_tokens
from tune_spaces.trial import Trial

SHORT_PASS_TOKENS = 256
"""Of a pass with newcomers, and of all while Ray Tune decides on a trial, whose place may soon have a newcomer: who
comes waits for the end of a pass."""


class Rounds:
    """A round is one step of every trial that trains. A trial that comes in the middle of one takes part in it."""

    def __init__(self) -> None:
        self._number = 1
        self._seconds = 0.0
        self._num_steps = 0

    def newcomers(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return those of `trials` that make their first step here in the next pass."""
        return _first_pass([trial for trial in trials if trial.is_new], limit=SHORT_PASS_TOKENS)

    def next_pass(self, trials: Collection[Trial]) -> list[Trial]:
        """Return those of `trials` that make a step in the next pass; none at the end of the round."""
        left = [trial for trial in trials if trial.is_training and trial.last_round < self._number]
        is_short = any(trial.waiting is None for trial in trials)
        return _first_pass(left, limit=SHORT_PASS_TOKENS if is_short else PASS_TOKENS)

    def note(self, trials: Sequence[Trial], *, seconds: float) -> None:
        """Count the step that `trials` have made in this round."""
        self._seconds += seconds
        self._num_steps += len(trials)
        for trial in trials:
            trial.last_round = self._number

    def end(self) -> float | None:
        """Begin the next round; return one trial's share of the time of a step, unless that says little of the next.

        In the first round memory is taken and kernels are chosen.
        """
        share_s = self._seconds / self._num_steps if self._num_steps and self._number > 1 else None
        self._number += bool(self._num_steps)
        self._seconds, self._num_steps = 0.0, 0
        return share_s


def _first_pass(trials: Sequence[Trial], *, limit: int) -> list[Trial]:
    """Return the first of `trials` with those of its shape that fit beside it."""
    same = [trial for trial in trials if trial.pack is trials[0].pack]
    parts = passes_of([pass_tokens(trial.pack, trial.slot, trial.done) for trial in same], limit=limit)
    return [same[i] for i in parts[0]] if parts else []
