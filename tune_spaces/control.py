"""A scheduler that leaves one trial alone: the plan's own values, to the end, to compare the winner with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class WithControl(TrialScheduler):  # type: ignore[misc] # Ray's interface
    """Lets `scheduler` decide on every trial but those whose values are `control`, which it may not stop.

    With `is_hidden`, it does not see them at all: population-based training would change their values.
    """

    def __init__(self, scheduler: TrialScheduler, control: Mapping[str, Any], *, is_hidden: bool) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._control = dict(control)
        self._is_hidden = is_hidden
        self._condemned: set[str] = set()

    def is_control(self, trial: Trial) -> bool:
        """Return whether the trial has the values to compare with."""
        return has_values(trial.config, self._control)

    @property
    def metric(self) -> str | None:
        """Return what the scheduler compares."""
        metric: str | None = self._scheduler.metric
        return metric

    @property
    def supports_buffered_results(self) -> bool:
        """Return whether the scheduler takes several results at once."""
        return bool(self._scheduler.supports_buffered_results)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tell the scheduler what to compare."""
        return bool(self._scheduler.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Pass on."""
        self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Pass on."""
        self._scheduler.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]) -> str:
        """Return the scheduler's decision, but never to stop the control; it is not asked again after it wanted to."""
        is_control = self.is_control(trial)
        if is_control and (self._is_hidden or trial.trial_id in self._condemned):
            return str(self.CONTINUE)
        decision = str(self._scheduler.on_trial_result(tune_controller, trial, result))
        if not is_control or decision != self.STOP:
            return decision
        self._condemned.add(trial.trial_id)
        return str(self.CONTINUE)

    def on_trial_complete(self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]) -> None:
        """Pass on."""
        self._scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Pass on."""
        self._scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: "TuneController") -> Trial | None:
        """Pass on."""
        return self._scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Pass on."""
        return str(self._scheduler.debug_string())

    def save(self, checkpoint_path: str) -> None:
        """Pass on."""
        self._scheduler.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Pass on."""
        self._scheduler.restore(checkpoint_path)


def has_values(config: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Return whether `config` has all the values of `control`."""
    return all(config.get(field) == value for field, value in control.items())
