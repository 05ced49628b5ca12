"""What a search says while it runs: a line for each report, and the same as JSON for `kajiya tune`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.result import AUTO_RESULT_KEYS
from ray.tune.schedulers import TrialScheduler

from train_jobs.progress import announce
from tune_spaces.budget import Budget, BudgetTooSmall, expected_steps
from tune_spaces.pack_plan import PackPlan
from tune_spaces.store import note
from tune_spaces.text import in_words, words
from tune_spaces.trial import DIVERGED_LOSS


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What is known of a search before its first step."""

    name: str
    folder: Path
    objective: str
    mode: str
    num_trials: int
    rungs: tuple[int, ...]
    reduction_factor: int | None
    """One in so many trials goes on at each rung; None where that is not how trials are stopped."""
    num_kept: int = 0
    """Trials that the scheduler may not stop: that of the plan's own values."""
    packs: PackPlan
    budget: Budget
    hours_of: str
    """What spends hours: "GPU", or "worker" on a machine without one."""
    first_worker: str | None
    """Ray's name for the worker whose steps are measured; None where each trial is a run of its own."""
    notes: tuple[dict[str, Any], ...]
    """What was noted before a crash, the oldest first."""

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of a whole trial."""
        return self.rungs[-1]

    @property
    def spent_before_s(self) -> float:
        """Return what was spent before the crash."""
        return max((line["spent_s"] for line in self.notes), default=0.0)

    @property
    def reports(self) -> tuple[dict[str, Any], ...]:
        """Return what trials reported before the crash."""
        return tuple(line for line in self.notes if "step" in line)

    @property
    def left_s(self) -> float | None:
        """Return what is left of the budget; None without one."""
        limit_s = self.budget.limit_s(self.packs.num_workers)
        return None if limit_s is None else max(0.001, limit_s - self.spent_before_s)


class Watch(tune.Callback):  # type: ignore[misc] # Ray's hook
    """Announces trials as they report, and what the search will cost once a step has been measured."""

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        self._begin_s = time.monotonic()
        self._measured: ray.ObjectRef | None = None
        self._predicted_s: float | None = None
        self._over = {line["trial_id"] for line in outline.notes if "state" in line}

    @property
    def spent_s(self) -> float:
        """Return the time since the search began, without the time that it lay still."""
        return round(self._outline.spent_before_s + time.monotonic() - self._begin_s, 1)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Look whether the first worker has measured a step.

        Raises:
            BudgetTooSmall: The budget ends before the first trials can be compared.
        """
        if self._predicted_s is not None or self._outline.first_worker is None:
            return
        if self._measured is None:
            self._measured = ray.get_actor(self._outline.first_worker).measured_step_s.remote()
        if ray.wait([self._measured], timeout=0)[0]:
            measured, self._measured = self._measured, None
            try:
                self._predict(ray.get(measured))
            except RayActorError:  # it died, and another one will be measured
                return

    def on_trial_start(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Announce that a trial has a slot."""
        self._tell("trial_start", f"{trial.trial_id} starts with {words(trial.config)}", trial, state="running")

    def on_trial_result(self, *_: Any, trial: Trial, result: dict[str, Any], **__: Any) -> None:
        """Announce one report."""
        outline = self._outline
        value = result[outline.objective]
        if outline.first_worker is None and self._predicted_s is None and result.get("losses"):
            self._predict(result["train_s"] / len(result["losses"]))
        self._tell(
            "trial",
            f"{trial.trial_id} step {result['step']}/{outline.num_steps}  {outline.objective} {value:.4f}  "
            f"{words(result['config'])}",
            trial,
            state="running",
            step=result["step"],
            num_steps=outline.num_steps,
            value=value,
            training_loss=result["training_loss"],
        )

    def on_checkpoint(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Keep what was reported: from now on a crash cannot undo it."""
        numbers = {key: value for key, value in trial.last_result.items() if isinstance(value, int | float)}
        ours = {key: value for key, value in numbers.items() if key not in AUTO_RESULT_KEYS}
        note(self._outline.folder, **ours, trial_id=trial.trial_id, config=trial.config, spent_s=self.spent_s)

    def on_trial_complete(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Announce that a trial is over."""
        self._end(trial, state_of(trial.last_result or {}, self._outline.num_steps))

    def on_trial_error(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Announce that a trial is over because it failed too often."""
        self._end(trial, "failed")

    def on_trial_recover(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Announce that a trial goes on after its worker died."""
        step = trial.last_result.get("step", 0) if trial.last_result else 0
        self._tell(
            "trial_recover",
            f"{trial.trial_id} lost its worker and goes on from its last checkpoint",
            trial,
            state="waiting",
            step=step,
        )

    def on_trial_restore(self, *_: Any, trial: Trial, **__: Any) -> None:
        """Announce that a trial has its checkpoint back."""
        self._tell("trial_restore", f"{trial.trial_id} goes on with its checkpoint", trial, state="running")

    def _end(self, trial: Trial, state: str) -> None:
        self._over.add(trial.trial_id)
        note(self._outline.folder, trial_id=trial.trial_id, state=state, spent_s=self.spent_s)
        predicted = f", predicted {in_words(self._predicted_s)}" if self._predicted_s else ""
        self._tell(
            "trial_over",
            f"{trial.trial_id} {state}; {len(self._over)} of {self._outline.num_trials} trials are over after "
            f"{in_words(self.spent_s)}{predicted}",
            trial,
            state=state,
        )

    def _tell(self, event: str, text: str, trial: Trial, **values: Any) -> None:
        announce(event, text, trial=trial.trial_id, config=trial.config, spent_s=self.spent_s, **values)

    def _predict(self, slot_step_s: float) -> None:
        outline, packs = self._outline, self._outline.packs
        steps = expected_steps(
            outline.rungs,
            num_trials=outline.num_trials,
            reduction_factor=outline.reduction_factor,
            num_kept=outline.num_kept,
        )
        self._predicted_s = self.spent_s + steps * slot_step_s / packs.num_workers
        limit_s = outline.budget.limit_s(packs.num_workers)
        hours = self._predicted_s * packs.num_workers / 3600
        note(outline.folder, predicted_s=self._predicted_s, spent_s=self.spent_s)
        announce(
            "cost",
            f"measured: {slot_step_s:.3g} s for each step of a trial; the search will take about "
            f"{in_words(self._predicted_s)} ({hours:.2g} {outline.hours_of} hours)"
            + (f", the budget is {outline.budget}" if limit_s is not None else ""),
            predicted_s=self._predicted_s,
            step_s=slot_step_s,
        )
        ensure_a_rung(outline, slot_step_s, spent_s=self.spent_s)


def ensure_a_rung(outline: Outline, slot_step_s: float, *, spent_s: float) -> None:
    """Check that the first trials can be compared before the budget ends; a step of each of them takes `slot_step_s`.

    Raises:
        BudgetTooSmall: They cannot.
    """
    packs, limit_s = outline.packs, outline.budget.limit_s(outline.packs.num_workers)
    num_together = min(packs.num_slots, -(-outline.num_trials // packs.num_workers))
    first_s = outline.rungs[0] * slot_step_s * num_together
    if limit_s is not None and not outline.reports and limit_s - spent_s < first_s:
        raise BudgetTooSmall(
            f"{outline.budget} ends before trials can be compared: a step of {num_together} trials takes "
            f"{in_words(slot_step_s * num_together)}, and the first comparison is at step {outline.rungs[0]}, "
            f"{in_words(spent_s + first_s)} after the start. Give more, or fewer --trials or --max-steps."
        )


class Recall(tune.Callback):  # type: ignore[misc] # Ray's hook
    """Tells the scheduler of a resumed search what was reported before: Ray restores trials and searchers alone."""

    def __init__(self, scheduler: TrialScheduler, reports: Sequence[dict[str, Any]]) -> None:
        self._scheduler = scheduler
        self._reports = tuple(reports)

    def setup(self, *_: Any, **__: Any) -> None:
        """Report again, before the first trial goes on."""
        trials: dict[str, Trial] = {}
        for report in self._reports:
            name = report["trial_id"]
            trial = trials.setdefault(name, Trial("none", stub=True, trial_id=name, config=report["config"]))
            self._scheduler.on_trial_result(None, trial, report)


def state_of(result: dict[str, Any], num_steps: int) -> str:
    """Return what became of a trial that is over."""
    if result.get("held_out_loss", 0.0) >= DIVERGED_LOSS:
        return "diverged"
    return "finished" if result.get("step", 0) >= num_steps else "stopped"
