"""The page of a search: one file, every trial told as it is, plots on scales that suit their values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import pytest
from matplotlib.patches import Rectangle
from ray.tune import Checkpoint, Result
from test_report import Reader

from train_jobs.evaluate import Evaluation
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.importance import importances
from tune_spaces.pack_plan import PackPlan
from tune_spaces.registration import Judgement
from tune_spaces.report import Summary, page, places
from tune_spaces.report_plots import costs, curves, front, importance_bars, parallel_coordinates, slices

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
EVIL = "<script>alert(1)</script>"


def trial(folder: Path, number: int) -> Result:
    """A trial whose loss falls with the learning rate alone; bad ones stop at the first rung."""
    loss = 3.0 - 0.4 * number
    steps = [3, 12] if number > 2 else [3]
    history = pandas.DataFrame({"step": steps, "held_out_loss": [3.0, loss][: len(steps)]})
    last = {
        "step": steps[-1],
        "held_out_loss": loss,
        "adapter_bytes": 2**20 * (4 + number % 2),
        "trial_id": f"t{number}",
    }
    config = {"learning_rate": RATES[number], "r": (4, 8)[number % 2], "targets": EVIL}
    return Result(
        metrics=last | {"config": config},
        checkpoint=Checkpoint(str(folder)),
        error=None,
        path=str(folder),
        metrics_dataframe=history,
    )


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    request = read_arguments(["--model", EVIL, "--data", "d.jsonl", "--name", "shop", "--trials", "6"])
    assert isinstance(request, SearchRequest)
    results = tuple(trial(tmp_path, number) for number in range(6))
    evaluation = Evaluation(loss=1.0, num_right=0, num_questions=0, answers=())
    return Summary(
        name="shop-1",
        request=request,
        results=results,
        best=results[5],
        baseline=results[1],
        judgement=Judgement(base=replace(evaluation, loss=3.5), best=evaluation, baseline_loss=2.6, baseline_step=3),
        version="tiny:shop@1",
        spent_s=90.0,
        predicted_s=60.0,
        packs=PackPlan(num_slots=6, num_workers=1, max_r=8, memory_bytes=0),
        is_packed=True,
    )


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.lines}


def test_the_page_is_one_file_that_fetches_and_runs_nothing(summary: Summary) -> None:
    reader = Reader()
    reader.feed(page(summary))
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert all(place.startswith("#") for place in reader.fetched)
    assert reader.tags.count("svg") == 6
    shown = " ".join(reader.texts)
    for text in (EVIL, "tiny:shop@1", "1.0000; the plan's own values reach 2.6000 in 3 steps; the bare base 3.5000"):
        assert text in shown
    assert "6, 6 at a time on 1 base" in shown


def test_the_registered_trial_and_the_plans_own_are_told_from_the_others(summary: Summary) -> None:
    drawn = lines(curves(summary).axes[0])
    assert drawn["registered"] == [(3, 3.0), (12, 1.0)]
    assert drawn["the plan's own values"] == [(3, 3.0)]
    legend = curves(summary).axes[0].get_legend()
    assert legend is not None
    assert sorted(text.get_text() for text in legend.get_texts()) == ["others", "registered", "the plan's own values"]


def test_learning_rates_lie_on_a_log_scale_and_ranks_side_by_side(summary: Summary) -> None:
    figure = slices(summary)
    assert figure is not None
    by_rate, by_rank = figure.axes
    assert (by_rate.get_xscale(), by_rank.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in by_rank.get_xticklabels()] == ["4", "8"]
    crossed = parallel_coordinates(summary)
    assert crossed is not None
    # from 1e-4 to 4e-3 on a log scale, 4e-3 is at the top; rank 8 is, too; and its loss is the lowest of all
    assert lines(crossed.axes[0])["registered"] == [(0, pytest.approx(1.0)), (1, 1.0), (2, 0.0)]


def test_what_decides_the_loss_is_the_most_important(summary: Summary) -> None:
    shares = importances(summary.results, ["held_out_loss"])
    assert set(shares) == {"learning_rate", "r"}, "a field with one value explains nothing"
    assert shares["learning_rate"] > shares["r"]
    assert importance_bars(summary) is not None
    assert importance_bars(replace(summary, results=summary.results[:3])) is None


def test_costs_and_the_front_are_in_units_of_people(summary: Summary) -> None:
    figure = costs(summary)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches if isinstance(bar, Rectangle)] == [1.5, 1.0]
    assert costs(replace(summary, predicted_s=None)) is None
    # 5 MiB reach 1.0, and 4 MiB at best 3.0 - 0.4 x 4
    assert [y for _, y in lines(front(summary).axes[0])["no other trial is better in both"]] == [
        pytest.approx(1.4),
        pytest.approx(1.0),
    ]


def test_trials_that_are_runs_of_their_own_are_told_so(summary: Summary) -> None:
    alone = replace(summary.packs, num_slots=1, num_workers=2)
    assert places(alone, is_packed=False) == "each a training run of its own, 2 at a time"
    assert places(alone, is_packed=True) == "1 at a time on each of 2 bases"
    assert "each a training run of its own" in page(replace(summary, packs=alone, is_packed=False))
