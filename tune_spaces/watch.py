"""What a search says while it runs: a line for each report, and the same as JSON for `kajiya tune`."""

import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from train_jobs.progress import announce
from tune_spaces.budget import predicted_s
from tune_spaces.pack_plan import PackPlan


class Watch(tune.Callback):  # type: ignore[misc] # Ray's hook
    """Announces trials as they report, and what the whole search will take once a step has been measured."""

    def __init__(self, packs: PackPlan, *, num_trials: int, num_steps: int, objective: str) -> None:
        self._packs = packs
        self._num_trials = num_trials
        self._num_steps = num_steps
        self._objective = objective
        self._begin_s = time.monotonic()
        self._predicted_s: float | None = None
        self._ended: set[str] = set()

    def on_trial_result(self, *_: Any, trial: Trial, result: dict[str, Any], **__: Any) -> None:
        """Announce one report."""
        if self._predicted_s is None:
            self._predict(result)
        values = " ".join(f"{field}={_short(value)}" for field, value in result["config"].items())
        announce(
            "trial",
            f"{trial.trial_id} step {result['step']}/{self._num_steps}  {self._objective} "
            f"{result[self._objective]:.4f}  {values}",
            trial=trial.trial_id,
            step=result["step"],
            num_steps=self._num_steps,
            objective=self._objective,
            value=result[self._objective],
            config=result["config"],
        )

    def on_trial_complete(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Announce that a trial is over."""
        self._ended.add(trial.trial_id)
        spent_s = time.monotonic() - self._begin_s
        announce(
            "trial_over",
            f"{len(self._ended)} of {self._num_trials} trials are over after {spent_s:.0f} s"
            + (f" ({self._predicted_s:.0f} s predicted without early stopping)" if self._predicted_s else ""),
            trial=trial.trial_id,
            num_over=len(self._ended),
            num_trials=self._num_trials,
            spent_s=spent_s,
            predicted_s=self._predicted_s,
        )

    def _predict(self, result: dict[str, Any]) -> None:
        self._predicted_s = predicted_s(
            result["train_s"] / result["step"],
            num_steps_each=self._num_steps,
            num_trials=self._num_trials,
            num_slots=self._packs.num_slots,
            num_workers=self._packs.num_workers,
        )

    @property
    def predicted_s(self) -> float | None:
        """Return the prediction; None before the first report."""
        return self._predicted_s


def _short(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) and (abs(value) < 0.01 or abs(value) >= 1000) else str(value)
