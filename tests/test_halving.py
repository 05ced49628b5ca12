"""When trials are compared, and that ASHA keeps the best of those that arrive together."""

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tune_spaces.halving import release_order, rungs


def test_rungs_grow_by_the_factor_and_end_at_the_end() -> None:
    assert rungs(20, first=2, reduction_factor=4) == (2, 8, 20)
    assert rungs(20, first=5, reduction_factor=4) == (5, 20)
    assert rungs(20, first=20, reduction_factor=4) == (20,)
    assert rungs(64, first=4, reduction_factor=4) == (4, 16, 64)
    with pytest.raises(ValueError, match="step 21 of 20"):
        rungs(20, first=21, reduction_factor=4)


def kept_by_asha(losses: list[float], order: list[int]) -> set[int]:
    asha = ASHAScheduler(time_attr="step", metric="loss", mode="min", grace_period=2, max_t=32, reduction_factor=4)
    trials = [Trial("none", stub=True) for _ in losses]
    for trial in trials:
        asha.on_trial_add(None, trial)
    kept = set()
    for index in order:
        decision = asha.on_trial_result(
            None, trials[index], {"step": 2, "training_iteration": 1, "loss": losses[index]}
        )
        kept |= {index} if decision == TrialScheduler.CONTINUE else set()
    return kept


@pytest.mark.parametrize("num_trials", [1, 3, 4, 8, 16])
def test_of_trials_that_arrive_together_asha_keeps_exactly_the_best_quarter(num_trials: int) -> None:
    losses = [((i * 7) % num_trials) + 1.0 for i in range(num_trials)]
    order = release_order(losses, reduction_factor=4)
    assert sorted(order) == list(range(num_trials))
    best = sorted(range(num_trials), key=lambda i: losses[i])[: max(1, num_trials // 4)]
    assert kept_by_asha(losses, order) == set(best)


def test_in_another_order_it_would_keep_others() -> None:
    losses = [float(16 - i) for i in range(16)]  # each better than the one before
    assert len(kept_by_asha(losses, list(range(16)))) > 4
