"""The Ray actor whose slots trials train in: what they, the driver and the report ask of it.

Whoever has a handle of an actor imports its module, each of the trials' processes too: torch and all of the model's
code, three seconds and 400 MiB, stay in `tune_spaces.pack_owner`.
"""

import pickle
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from tune_spaces.shapes import Shape
from tune_spaces.trial import FileContent, TrialReport

if TYPE_CHECKING:
    from train_jobs.evaluate import Evaluation
    from train_jobs.job import AdapterJob, TrainJob
    from train_jobs.pack import PackSize
    from tune_spaces.trial_state import TrialState


class PackWorker:
    """Holds one base and trains the K trials in its slots together. Run it with a concurrency of 2 K + 3."""

    def __init__(
        self,
        job: "TrainJob",
        size: "PackSize",
        *,
        reduction_factor: int,
        jobs: "Mapping[Shape, TrainJob] | None" = None,
    ) -> None:
        """Load the base; `jobs` are those of the shapes that trials may have beside the one of `job`."""
        from tune_spaces.pack_owner import PackOwner

        self._owner = PackOwner(job, size, reduction_factor=reduction_factor, jobs=jobs)

    def free_slots(self) -> int:
        """Return how many more trials fit."""
        return self._owner.num_free

    def enter(
        self,
        trial_id: str,
        adapter: "AdapterJob",
        state: "TrialState | FileContent | None" = None,
        *,
        shape: Shape | None = None,
        instead_of: str | None = None,
    ) -> bool:
        """Give a trial a slot, from its start or from `state`, also a kept one; False when there is none left.

        `shape` is one of `jobs`; None is that of the worker's own job. The trial `instead_of` leaves.
        """
        begun = pickle.loads(state.data) if isinstance(state, np.ndarray) else state  # noqa: S301 (the search's own)
        return self._owner.call(self._owner.enter, trial_id, adapter, begun, shape, instead_of)

    def leave(self, trial_id: str) -> None:
        """Free the trial's slot; a trial that is not here is no problem."""
        self._owner.call(self._owner.leave, trial_id)

    def advance(self, trial_id: str, until: int) -> TrialReport:
        """Train the trial together with all others up to its step `until`, and return how it does."""
        waiting: Future[TrialReport] = Future()
        self._owner.call(self._owner.ask, trial_id, until, waiting)
        return waiting.result()

    def state(self, trial_id: str) -> "TrialState":
        """Return all that `enter` needs to go on with the trial elsewhere."""
        return self._owner.call(self._owner.state, trial_id)

    def checkpoint(self, trial_id: str, *, with_state: bool) -> tuple[dict[str, FileContent], FileContent | None]:
        """Return the trial's adapter as the files of PEFT's format, and its `state` for a file."""
        return self._owner.call_beside(self._owner.checkpoint, trial_id, with_state=with_state)

    def right_answers(self, trial_id: str) -> tuple[int, int]:
        """Return how many of the held-out questions a trial answers right, and how many there are."""
        found = self._owner.call(self._owner.evaluation, trial_id)
        return found.num_right, found.num_questions

    def evaluation(self, trial_id: str | None) -> "Evaluation":
        """Return held-out loss and answers of a trial, or of the bare base."""
        return self._owner.call(self._owner.evaluation, trial_id)

    def evaluation_of(self, files: dict[str, bytes]) -> "Evaluation":
        """Return held-out loss and answers of an adapter in PEFT's format; needs a free slot."""
        return self._owner.call(self._owner.evaluation_of, files)

    def held_out_loss_of(self, files: dict[str, bytes]) -> float:
        """Return the held-out loss alone of an adapter in PEFT's format; needs a free slot."""
        return self._owner.call(self._owner.held_out_loss_of, files)

    def measured_step_s(self) -> float:
        """Wait for a measured step and return its share for one trial."""
        return self._owner.measured_step_s()
