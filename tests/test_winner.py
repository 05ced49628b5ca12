"""Which trial is kept, and the preset's own values beside it."""

from pathlib import Path
from typing import Any

import pytest
from ray.tune import Checkpoint, Result

from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.trial import DIVERGED_LOSS
from tune_spaces.winner import NothingFound, adapter_files, baseline_of, best_of


def asked(*words: str) -> SearchRequest:
    request = read_arguments(["--model", "m", "--data", "d", "--name", "n", *words])
    assert isinstance(request, SearchRequest)
    return request


def result(
    folder: Path, *, has_checkpoint: bool = True, config: dict[str, Any] | None = None, **metrics: Any
) -> Result:
    name = str(metrics)
    path = folder / str(abs(hash(name)))
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "a.txt").write_text(name)
    return Result(
        metrics={"step": 8, **metrics, "config": config or {}},
        checkpoint=Checkpoint.from_directory(str(path)) if has_checkpoint else None,
        error=None,
        path=str(path),
    )


def test_the_best_of_one_objective_is_kept_and_of_equals_the_longest_trained(tmp_path: Path) -> None:
    trials = [
        result(tmp_path, held_out_loss=2.0, adapter_bytes=10),
        result(tmp_path, held_out_loss=1.5, adapter_bytes=20, step=2),
        result(tmp_path, held_out_loss=1.5, adapter_bytes=30),
        result(tmp_path, held_out_loss=0.5, adapter_bytes=1, has_checkpoint=False),
        result(tmp_path, held_out_loss=DIVERGED_LOSS, adapter_bytes=2),
    ]
    assert best_of(trials, asked()) is trials[2]
    assert best_of(trials, asked("--objective", "held_out_loss,adapter_bytes")) is trials[1], "equal in loss, smaller"
    smaller = asked("--objective", "held_out_loss,adapter_bytes", "--within", "0.4")
    assert best_of(trials, smaller) is trials[0], "at most 1.5 x 1.4 = 2.1, the smallest of those"


def test_the_most_right_answers_are_kept(tmp_path: Path) -> None:
    trials = [result(tmp_path, held_out_loss=1.0 + i, exact_match=share) for i, share in enumerate((0.2, 0.8, 0.5))]
    assert best_of(trials, asked("--objective", "exact_match")) is trials[1]


def test_without_a_report_there_is_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(NothingFound, match="No trial reached its first report: the budget ended"):
        best_of([result(tmp_path, held_out_loss=DIVERGED_LOSS)], asked())
    with pytest.raises(NothingFound, match="first report: out of memory"):
        best_of([], asked(), errors=[RuntimeError("Trace:\nout of memory")])


def test_the_baseline_is_the_trial_with_the_plans_own_values(tmp_path: Path) -> None:
    own, other = {"r": 8, "learning_rate": 1e-4}, {"r": 8, "learning_rate": 2e-4}
    trials = [result(tmp_path, config=other, held_out_loss=1.0), result(tmp_path, config=own, held_out_loss=2.0)]
    assert baseline_of(trials, own) is trials[1]
    assert baseline_of(trials[:1], own) is None
    assert b"2.0" in adapter_files(trials[1])["a.txt"]
