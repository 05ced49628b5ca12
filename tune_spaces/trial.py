"""A trial in a slot of a pack, and what it reports."""

import math
import secrets
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # it imports torch
    from train_jobs.pack import Pack

FileContent: TypeAlias = npt.NDArray[np.uint8]
"""Ray puts arrays into its store as they are, and bytes by way of two copies."""
DIVERGED_LOSS = 1e9
"""Stands for infinity and for what is no number; schedulers and searchers cannot compare those."""


class TrialLeft(RuntimeError):
    """Steps were wanted for a trial that left meanwhile."""


def entry_of(trial_id: str) -> str:
    """Return a new id under which a trial enters a worker.

    Ray Tune may let a trial go on in another actor before the one before has given its slot back: that one leaves under
    its own id, and not under the trial's.
    """
    return f"{trial_id}#{secrets.token_hex(4)}"


def is_same_trial(entry: str, other: str) -> bool:
    """Return whether two ids of `entry_of` belong to one trial."""
    return entry.partition("#")[0] == other.partition("#")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialReport:
    """What a trial has reached."""

    step: int
    """Optimizer steps done."""
    held_out_loss: float
    """`DIVERGED_LOSS` when the training loss is no number any more."""
    losses: tuple[float, ...]
    """Of the steps since the report before."""
    num_tokens: int
    """Trained on since the report before, prompts included."""
    seconds: float
    """Of the steps since the report before, each shared with whoever was in the pass."""
    first_step_at: float
    """When its first step on this worker was done, in seconds since the epoch."""
    first_step_s: float
    """What that step took."""


@dataclass(kw_only=True, slots=True)
class Trial:
    """One trial in a slot."""

    slot: int
    pack: "Pack"
    """The worker's, with the batches of this trial."""
    done: int = 0
    """Optimizer steps."""
    until: int = 0
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    first_step_at: float = 0.0
    first_step_s: float = 0.0
    last_round: int = 0
    """In which it made a step here; 0 until it has."""
    waiting: "Future[TrialReport] | None" = None
    """Whoever asked for steps; None while Ray Tune decides what becomes of the trial."""

    @property
    def is_training(self) -> bool:
        """Return whether somebody waits for steps that it has yet to make."""
        return self.waiting is not None and self.done < self.until

    @property
    def is_new(self) -> bool:
        """Return whether it waits for its first step on this worker."""
        return self.is_training and not self.last_round

    @property
    def is_at_rung(self) -> bool:
        """Return whether it has made the steps it was asked for, or cannot go on, and has yet to report."""
        return self.waiting is not None and bool(self.losses) and self.done >= self.until

    def note(self, loss: float, *, num_tokens: int, seconds: float) -> None:
        """Count one step; a loss that is no number ends the trial."""
        self.done += 1
        self.num_tokens += num_tokens
        self.seconds += seconds
        if not self.first_step_at:
            self.first_step_at, self.first_step_s = time.time(), seconds
        self.losses.append(loss if math.isfinite(loss) else DIVERGED_LOSS)
        if self.losses[-1] == DIVERGED_LOSS:
            self.until = self.done

    def report(self, held_out_loss: float) -> TrialReport:
        """Return what was reached since the report before."""
        losses, self.losses = tuple(self.losses), []
        num_tokens, self.num_tokens = self.num_tokens, 0
        seconds, self.seconds = self.seconds, 0.0
        return TrialReport(
            step=self.done,
            held_out_loss=held_out_loss,
            losses=losses,
            num_tokens=num_tokens,
            seconds=seconds,
            first_step_at=self.first_step_at,
            first_step_s=self.first_step_s,
        )

    def tell(self, report: TrialReport) -> None:
        """Answer whoever asked for steps."""
        if waiting := self._taken():
            waiting.set_result(report)

    def fail(self, error: Exception) -> None:
        """Tell whoever asked for steps that there will be none."""
        if waiting := self._taken():
            waiting.set_exception(error)

    def _taken(self) -> "Future[TrialReport] | None":
        waiting, self.waiting = self.waiting, None
        return waiting
