"""A Ray Tune trial that trains in a slot of a pack worker instead of a process of its own."""

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial

from cluster.errors import UserError
from tune_spaces.shared import Shared
from tune_spaces.trial import DIVERGED_LOSS, FileContent, TrialReport, entry_of
from tune_spaces.trial_jobs import ADAPTER_FOLDER, adapter_job, size_metrics

STATE_FILE = "state.pkl"
NICER_THAN_WORKER = 4
"""What trials write, up to hundreds of MiB at a time, takes turns with a pack that all others wait for."""


class NoSlot(UserError, RuntimeError):
    """Every slot of every worker is taken."""


class PackedTrial(tune.Trainable):  # type: ignore[misc] # Ray's interface of a trial with checkpoints
    """Asks its worker for steps up to the next rung. One actor serves many trials in turn (`reuse_actors`)."""

    def setup(self, config: Mapping[str, Any], shared: Shared) -> None:
        """Take a slot."""
        os.nice(NICER_THAN_WORKER)
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they would tell of every checkpoint
        self._shared = shared
        self._worker: ActorHandle | None = None
        self._name: str | None = None
        self._step = 0
        self._enter(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Give the slot to another trial, or to this one with other values."""
        self._step = 0
        self._enter(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung and return the metrics."""
        until = next(rung for rung in self._shared.rungs if rung > self._step)
        report: TrialReport = ray.get(self._worker.advance.remote(self._name, until))  # type: ignore[union-attr]
        self._step = report.step
        is_over = report.step >= self._shared.rungs[-1] or report.held_out_loss >= DIVERGED_LOSS
        self._goes_on = not is_over
        return self._metrics(report) | {"done": is_over}

    def expect_stop(self) -> None:
        """Learn that Ray Tune will stop the trial once it has its next checkpoint."""
        self._goes_on = False

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the adapter in PEFT's format, and what the trial needs to go on unless it has ended."""
        folder, goes_on = Path(checkpoint_dir), self._goes_on
        (folder / ADAPTER_FOLDER).mkdir()
        files, state = ray.get(self._worker.checkpoint.remote(self._name, with_state=goes_on))  # type: ignore[union-attr]
        for name, content in files.items():
            (folder / ADAPTER_FOLDER / name).write_bytes(content)
        if goes_on:
            with (folder / STATE_FILE).open("wb") as file:
                pickle.dump((self._step, state), file, protocol=5)  # which writes an array without a copy

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on where the checkpoint was written, with the values this trial has now."""
        path = Path(checkpoint_dir) / STATE_FILE
        if path.is_file():
            self._step, state = pickle.loads(path.read_bytes())  # noqa: S301 (the search's own file)
            self._enter(self.config, state)

    def cleanup(self) -> None:
        """Give the slot back."""
        if self._worker is not None:
            ray.get(self._worker.leave.remote(self._name))
            self._worker = None

    def _enter(self, config: Mapping[str, Any], state: FileContent | None = None) -> None:
        """Take a slot: the one that this actor has, if it has one, in the same call that gives it back."""
        self._goes_on = True
        before, workers = self._name, self._shared.workers if self._worker is None else (self._worker,)
        self._name, self._worker = entry_of(self.trial_id), None
        self._adapter = adapter_job(self._shared.default, config)
        shape = self._shared.shape_with(config)
        for worker in workers:
            if ray.get(worker.enter.remote(self._name, self._adapter, state, shape=shape, instead_of=before)):
                self._worker = worker
                return
        raise NoSlot("Every slot is taken; there are more trials at a time than slots.")

    def _metrics(self, report: TrialReport) -> dict[str, Any]:
        sizes = size_metrics(self._shared.job.card, self._adapter, weight_bytes=self._shared.weight_bytes)
        metrics = sizes | {
            "step": report.step,
            "held_out_loss": report.held_out_loss,
            "training_loss": report.losses[-1],
            "losses": report.losses,
            "num_tokens": report.num_tokens,
            "train_s": report.seconds,
            "first_step_at": report.first_step_at,
            "first_step_s": report.first_step_s,
        }
        if self._shared.is_exact_match:
            num_right, count = ray.get(self._worker.right_answers.remote(self._name))  # type: ignore[union-attr]
            metrics["exact_match"] = num_right / max(1, count)
        return metrics


class Farewell(tune.Callback):  # type: ignore[misc] # Ray's hook
    """Tells trials that they will be stopped before they write their last checkpoint: of a large adapter, the moments
    for going on are most of it.
    """

    def on_trial_result(self, *_: Any, trial: Trial, result: dict[str, Any], **__: Any) -> None:
        """Tell the trial, whose calls are made in order; its checkpoint is asked for after this."""
        if result.get("done"):
            trial.temporary_state.ray_actor.expect_stop.remote()
