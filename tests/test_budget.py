"""What a search may cost, and what it will cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import plan_training
from train_jobs.command_line import duration_s
from tune_spaces.budget import Budget, BudgetTooSmall, expected_steps
from tune_spaces.pack_plan import PackPlan
from tune_spaces.text import in_words
from tune_spaces.watch import Outline, ensure_a_rung


def outline(budget: Budget) -> Outline:
    return Outline(
        name="s",
        folder=Path("s"),
        objective="held_out_loss",
        mode="min",
        num_trials=16,
        rungs=(2, 8, 20),
        reduction_factor=4,
        packs=PackPlan(num_slots=8, num_workers=2, max_r=8, memory_bytes=0),
        budget=budget,
        hours_of="GPU",
        first_worker="w",
        notes=(),
    )


def test_gpu_hours_are_spent_by_all_workers_together() -> None:
    assert Budget(max_time_s=None, max_gpu_hours=1.0).limit_s(4) == 900
    assert Budget(max_time_s=600, max_gpu_hours=1.0).limit_s(4) == 600
    assert Budget(max_time_s=600, max_gpu_hours=0.1).limit_s(4) == 90
    assert Budget(max_time_s=None, max_gpu_hours=None).limit_s(4) is None


def test_halving_by_four_expects_a_quarter_to_go_on() -> None:
    # 16 trials make 2 steps, 4 make 6 more, 1 makes the last 12
    assert expected_steps((2, 8, 20), num_trials=16, reduction_factor=4) == 32 + 24 + 12
    assert expected_steps((2, 8, 20), num_trials=1, reduction_factor=4) == 20
    # and with one that goes to the end: 20 steps, 15 others make 2, 3 of them 6 more, 1 the last 12
    assert expected_steps((2, 8, 20), num_trials=16, reduction_factor=4, num_kept=1) == 20 + 30 + 18 + 12
    assert expected_steps((2, 8, 20), num_trials=1, reduction_factor=4, num_kept=1) == 20
    assert expected_steps((20,), num_trials=16, reduction_factor=None) == 320


def test_a_budget_that_ends_before_the_first_rung_is_refused_once_a_step_is_measured() -> None:
    # 8 trials together on each worker: a step of all takes 8 s, the first rung is after 2 of them
    with pytest.raises(BudgetTooSmall, match=r"--max-time 30s ends before .* takes 8s, .* at step 2, 36s after"):
        ensure_a_rung(outline(Budget(max_time_s=30, max_gpu_hours=None)), 1.0, spent_s=20)
    ensure_a_rung(outline(Budget(max_time_s=36, max_gpu_hours=None)), 1.0, spent_s=20)
    ensure_a_rung(outline(Budget(max_time_s=None, max_gpu_hours=None)), 1e9, spent_s=20)


def test_what_was_spent_before_a_crash_is_not_there_again() -> None:
    budget = Budget(max_time_s=100, max_gpu_hours=None)
    again = replace(outline(budget), notes=({"spent_s": 20.0}, {"spent_s": 70.0, "step": 2}))
    assert again.left_s == 30
    assert again.reports == ({"spent_s": 70.0, "step": 2},)
    assert outline(budget).left_s == 100


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("0.5h", 1800), ("1m30s", 90)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


def test_times_are_written_as_they_are_read() -> None:
    assert [in_words(s) for s in (0.25, 42.4, 600, 5400, 7200)] == ["0.25s", "42s", "10m", "90m", "2h00m"]
    assert duration_s(in_words(7200)) == 7200


def test_the_least_time_of_a_step_is_below_what_any_gpu_needs() -> None:
    # 4 FLOP x 14.77e9 weights x 1 token at 989 TFLOP/s, an H100's dense bf16, take 60 us; the floor must be below
    from tune_spaces.budget import FLOP_PER_WEIGHT, GPU_FLOPS

    plan = plan_training(find("qwen2.5-14b-instruct"), declared(gpu="H100"), method="lora", num_workers=1)
    floor_s = FLOP_PER_WEIGHT * plan.card.num_active_parameters() / GPU_FLOPS
    assert 1e-5 < floor_s < 6e-5
