"""What the measurements of searches count, without a search."""

from types import SimpleNamespace

import pytest

from benchmarks import tuning_clock
from benchmarks.processes import peak_of_processes
from benchmarks.tuning import gain_result
from benchmarks.tuning_clock import FIRST_STEP_AT, FIRST_STEP_S, TrialClock
from benchmarks.tuning_search import more_points, points_of
from tune_spaces.pack_plan import MAX_SLOTS


def test_fewer_trials_are_spread_over_the_grid_and_sixteen_are_all_of_it() -> None:
    assert len({tuple(point.items()) for point in points_of(16)}) == 16
    assert [point["r"] for point in points_of(4)] == [4, 8, 32, 64]
    assert len(more_points()) == 24 > MAX_SLOTS, "else no trial has to wait for a place"


def test_a_trial_is_wanted_when_the_one_before_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TrialClock()
    first, second = (SimpleNamespace(trial_id=name) for name in "ab")
    clock.on_trial_start(0, [], first)
    clock.on_trial_result(0, [], first, {FIRST_STEP_AT: 5.0})
    monkeypatch.setattr(tuning_clock, "time", SimpleNamespace(time=lambda: 10.0))
    clock.on_trial_complete(0, [], first)
    clock.on_trial_start(0, [], second)
    clock.on_trial_result(0, [], second, {FIRST_STEP_AT: 42.0})
    clock.on_trial_result(0, [], second, {FIRST_STEP_AT: 42.0})
    assert clock.first_step_s == [32.0]  # the first trial waits for Ray, too, and does not count
    assert clock.begun_s == []


def test_a_step_begins_as_long_before_it_is_made_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TrialClock()
    monkeypatch.setattr(tuning_clock, "time", SimpleNamespace(time=lambda: 10.0))
    clock.on_trial_complete(0, [], SimpleNamespace(trial_id="a"))
    clock.on_trial_start(0, [], SimpleNamespace(trial_id="b"))
    clock.on_trial_result(0, [], SimpleNamespace(trial_id="b"), {FIRST_STEP_AT: 11.5, FIRST_STEP_S: 0.5})
    assert (clock.first_step_s, clock.begun_s) == ([1.5], [1.0])


@pytest.mark.parametrize(("num_tokens", "is_met"), [(64, False), (65, True)])
def test_the_largest_pack_has_to_gain_most_where_a_run_alone_waits_for_memory(num_tokens: int, *, is_met: bool) -> None:
    (claim,) = gain_result({1: [90.0, 100.0, 110.0], 16: [150.0, 150.0, 150.0]}, "fp32", num_tokens).claims
    assert claim.measured == pytest.approx(1.5)
    assert claim.is_met is is_met


def test_the_peak_is_that_of_this_process_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.processes.INTERVAL_S", 0.01)
    with peak_of_processes() as peak:
        block = bytearray(b"x") * (1 << 26)
        while peak.num_bytes == 0:
            pass
    assert peak.num_bytes > len(block)
