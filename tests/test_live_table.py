"""A search's events as a table, and what of a search outlives a crash."""

import io
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from rich.console import Console

from tune_spaces.live_table import LiveTable
from tune_spaces.store import NOTES_FILE, note, notes, predicted_s
from tune_spaces.watch import Recall, state_of

OPENING = {
    "event": "search",
    "text": "",
    "search": "s",
    "objective": "held_out_loss",
    "mode": "min",
    "num_trials": 3,
    "num_steps": 20,
    "num_workers": 2,
    "hours_of": "GPU",
    "limit_s": 7200,
}


def drawn(table: LiveTable, height: int = 40) -> str:
    console = Console(width=140, height=height, file=io.StringIO())
    console.print(table.show(console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def event(kind: str, trial: str, **values: Any) -> dict[str, Any]:
    return {"event": kind, "text": "", "trial": trial, "config": {"r": 8, "learning_rate": 2e-4}, **values}


def test_the_table_shows_each_trial_the_best_and_the_cost() -> None:
    table = LiveTable(clock=lambda: 100.0)
    assert not table.take(OPENING)  # its text names the search, and is printed
    assert table.take({"event": "cost", "predicted_s": 3600.0})
    assert table.take(event("trial_start", "a", state="running", spent_s=10.0))
    assert table.take(event("trial", "a", step=2, value=1.5, training_loss=1.25, spent_s=900.0))
    assert table.take(event("trial", "b", step=2, value=1.75, training_loss=1.5, spent_s=1800.0))
    assert table.take(event("trial_over", "b", state="stopped", spent_s=1800.0))
    assert not table.take({"event": "registered", "text": "registered"})
    text = drawn(table)
    line_a, line_b = (next(line for line in text.splitlines() if line.startswith(name)) for name in (" a ", " b "))
    for cell in ("8", "2.00e-04", "2/20", "1.2500", "1.5000", "best, running"):
        assert cell in line_a
    assert "stopped" in line_b
    # 1800 s on 2 GPUs are one GPU hour, of two that were predicted
    assert "1 of 3 trials over · 30m of about 60m · 1 of about 2 GPU hours · budget 2h00m" in text
    assert "best so far: r=8 learning_rate=2.00e-04  held_out_loss 1.5000" in text


def test_of_many_trials_those_that_run_and_the_best_are_shown() -> None:
    table = LiveTable(clock=lambda: 0.0)
    table.take(OPENING)
    for number in range(30):
        state = "running" if number == 29 else "stopped"
        table.take(event("trial", f"t{number:02}", step=2, value=float(number), state=state))
    text = drawn(table, height=16)
    assert [name for name in ("t29", "t00", "t01", "t02") if name in text] == ["t29", "t00", "t01", "t02"]
    assert "t03" not in text
    assert "… and 26 more" in text


def test_a_resumed_search_shows_what_was_before() -> None:
    table = LiveTable(clock=lambda: 0.0)
    before = [
        {"trial_id": "a", "config": {"r": 4}, "step": 20, "held_out_loss": 1.5, "spent_s": 60.0},
        {"trial_id": "a", "state": "finished", "spent_s": 61.0},
    ]
    table.take(OPENING | {"before": before})
    assert "best, finished" in drawn(table)
    assert "1 of 3 trials over · 61s" in drawn(table)


def test_notes_outlive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    assert notes(tmp_path) == []
    note(tmp_path, trial_id="a", step=2)
    note(tmp_path, predicted_s=12.5)
    with (tmp_path / NOTES_FILE).open("a") as file:
        file.write('{"trial_id": "b", "st')
    assert notes(tmp_path) == [{"trial_id": "a", "step": 2}, {"predicted_s": 12.5}]
    assert predicted_s(tmp_path) == 12.5
    note(tmp_path, trial_id="c", step=2)
    note(tmp_path, trial_id="d", step=2)
    assert [line.get("trial_id") for line in notes(tmp_path)] == ["a", None, "d"]


def asha_after(reports: list[dict[str, Any]]) -> str:
    """Return what ASHA decides on a trial of loss 2 at step 2, reminded of `reports`."""
    asha = ASHAScheduler(time_attr="step", metric="loss", mode="min", grace_period=2, max_t=32, reduction_factor=4)
    names = sorted({report["trial_id"] for report in reports})
    trials = {name: Trial("none", stub=True, trial_id=name) for name in [*names, "new"]}
    for trial in trials.values():
        asha.on_trial_add(None, trial)
    Recall(asha, reports).setup()
    result = {"step": 2, "training_iteration": 1, "loss": 2.0}
    return str(asha.on_trial_result(None, trials["new"], result))


def test_a_resumed_scheduler_compares_with_trials_from_before_the_crash() -> None:
    before = [{"trial_id": str(i), "config": {}, "step": 2, "loss": 1.0} for i in range(4)]
    assert asha_after([]) == TrialScheduler.CONTINUE
    assert asha_after(before) == TrialScheduler.STOP


def test_what_became_of_a_trial_follows_from_its_last_report() -> None:
    assert state_of({"step": 20, "held_out_loss": 1.0}, 20) == "finished"
    assert state_of({"step": 8, "held_out_loss": 1.0}, 20) == "stopped"
    assert state_of({"step": 8, "held_out_loss": 1e9}, 20) == "diverged"
