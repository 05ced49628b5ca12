"""The trial of the plan's own values is compared with, but never stopped or changed."""

import copy

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from tune_spaces.methods import SchedulerName, scheduler
from tune_spaces.values import Range

CONTROL = {"learning_rate": 1e-4}


class NobodyWaits:
    """What schedulers ask of Tune's controller."""

    search_alg = None

    def get_live_trials(self) -> list[Trial]:
        return []

    get_trials = get_live_trials


SPACE = {"learning_rate": Range(low=1e-5, high=1e-3)}


def trial_of(learning_rate: float) -> Trial:
    trial = Trial("none", stub=True, config={"learning_rate": learning_rate})
    trial.status = Trial.RUNNING
    return trial


def decisions(
    name: SchedulerName, *, control: dict[str, float] | None, losses: dict[float, list[float]]
) -> dict[float, list[str]]:
    """Return what becomes of trials that report in turn at steps 2, 4 and 6; the worst of them come last."""
    made = copy.deepcopy(scheduler(name, SPACE, rungs=(2, 8), control=control))  # as Tuner does
    made.set_search_properties("loss", "min")
    trials = {rate: trial_of(rate) for rate in losses}
    for trial in trials.values():
        made.on_trial_add(None, trial)
    said: dict[float, list[str]] = {rate: [] for rate in losses}
    for index in range(3):
        for rate, trial in trials.items():
            if TrialScheduler.STOP not in said[rate]:
                result = {"step": 2 * (index + 1), "training_iteration": index + 1, "loss": losses[rate][index]}
                said[rate].append(made.on_trial_result(NobodyWaits(), trial, result))
    return said


LOSSES = {1e-5: [1.0] * 3, 2e-5: [1.1] * 3, 3e-5: [1.2] * 3, 4e-5: [1.3] * 3, 1e-4: [9.0] * 3, 2e-4: [9.0] * 3}


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_bad_control_goes_to_its_end_and_another_bad_trial_does_not(name: SchedulerName) -> None:
    said = decisions(name, control=CONTROL, losses=LOSSES)
    assert said[1e-4] == [TrialScheduler.CONTINUE] * 3
    assert said[2e-4][-1] == TrialScheduler.STOP
    without = decisions(name, control=None, losses=LOSSES)
    assert without[1e-4][-1] == TrialScheduler.STOP
    assert {rate: said[rate] for rate in LOSSES if rate != 1e-4} == {
        rate: without[rate] for rate in LOSSES if rate != 1e-4
    }, "to all others it makes no difference"


def test_population_based_training_does_not_see_the_control() -> None:
    made = scheduler("pbt", SPACE, rungs=(2, 8), control=CONTROL)
    made.set_search_properties("loss", "min")
    trials = [trial_of(rate) for rate in (1e-4, 2e-4)]
    for trial in trials:
        made.on_trial_add(NobodyWaits(), trial)
        made.on_trial_result(NobodyWaits(), trial, {"step": 2, "training_iteration": 1, "loss": 1.0})
    (pbt,) = [part for part in vars(made).values() if isinstance(part, PopulationBasedTraining)]
    assert [pbt._trial_state[trial].last_score for trial in trials] == [None, -1.0]
