"""Which trials make their next step together, and in which order their steps go."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from train_jobs.batches import DataOrder
from tune_spaces import rounds
from tune_spaces.rounds import Rounds
from tune_spaces.trial import Trial

LATE_SLOT = 9


def pack_with(num_tokens: int) -> Any:
    """Return what a pack tells of its trials, whose steps have four samples and `num_tokens` tokens each."""
    order = DataOrder(lengths=np.full(4, num_tokens // 4, dtype=np.int32), batch_size=4, seed=0)
    runs = dict.fromkeys(range(10), SimpleNamespace(order=order))
    return SimpleNamespace(runs=runs, job=SimpleNamespace(gradient_accumulation_steps=1))


def trial(pack: Any, slot: int) -> Trial:
    return Trial(slot=slot, pack=pack, until=8, waiting=Future())


def made(order: Rounds, trials: list[Trial]) -> list[int]:
    for one in trials:
        one.note(1.0, num_tokens=1, seconds=1.0)
    order.note(trials, seconds=1.0)
    return [one.slot for one in trials]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PASS_TOKENS", 1024)
    monkeypatch.setattr(rounds, "SHORT_PASS_TOKENS", 256)


@pytest.mark.usefixtures("limits")
def test_a_newcomer_goes_first_and_takes_part_in_the_round_under_way() -> None:
    order, pack = Rounds(), pack_with(480)
    trials = [trial(pack, slot) for slot in range(5)]
    assert [made(order, order.newcomers(trials)) for _ in trials] == [[0], [1], [2], [3], [4]]
    order.end()
    assert order.newcomers(trials) == []
    assert made(order, order.next_pass(trials)) == [0, 1]  # a third one would make it 1,440 tokens
    trials.append(trial(pack, LATE_SLOT))
    assert made(order, order.newcomers(trials)) == [LATE_SLOT]
    assert [made(order, order.next_pass(trials)) for _ in range(3)] == [[2, 3], [4], []]
    order.end()
    assert made(order, order.next_pass(trials)) == [0, 1]
    assert [one.done for one in trials] == [3, 3, 2, 2, 2, 1]


@pytest.mark.usefixtures("limits")
def test_newcomers_with_short_steps_share_a_pass() -> None:
    order, pack = Rounds(), pack_with(96)
    trials = [trial(pack, slot) for slot in range(3)]
    assert [made(order, order.newcomers(trials)) for _ in range(2)] == [[0, 1], [2]]


@pytest.mark.usefixtures("limits")
def test_passes_are_short_while_a_place_may_become_free() -> None:
    order, pack = Rounds(), pack_with(240)
    trials = [trial(pack, slot) for slot in range(5)]
    made(order, trials)
    order.end()
    trials[4].waiting = None  # Ray Tune decides what becomes of it
    assert made(order, order.next_pass(trials)) == [0]
    trials[4].waiting = Future()
    assert made(order, order.next_pass(trials)) == [1, 2, 3, 4]  # 960 tokens


@pytest.mark.usefixtures("limits")
def test_trials_of_other_shapes_and_those_that_nobody_asks_for_steps_stay_out_of_a_pass() -> None:
    order, pack, other = Rounds(), pack_with(64), pack_with(64)
    trials = [trial(pack, 0), trial(other, 1), trial(pack, 2), trial(pack, 3)]
    trials[3].waiting = None
    assert [made(order, order.newcomers(trials)) for _ in range(3)] == [[0, 2], [1], []]


def test_a_step_is_measured_over_a_whole_round_that_is_not_the_first() -> None:
    order, pack = Rounds(), pack_with(64)
    trials = [trial(pack, slot) for slot in range(4)]
    assert order.end() is None
    order.note(trials, seconds=9.0)
    assert order.end() is None
    order.note(trials[:3], seconds=5.0)
    order.note(trials[3:], seconds=1.0)
    assert order.end() == pytest.approx(6.0 / 4)
