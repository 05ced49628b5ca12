"""The page of a finished run: everything in one file, everything escaped, the numbers those of the run."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from registered import plain_manifest

from train_jobs.checkpoint import HeldOut
from train_jobs.evaluate import Evaluation
from train_jobs.job import Question
from train_jobs.loop import Outcome
from train_jobs.page import write_page
from train_jobs.progress import StepMetrics
from train_jobs.report import Finished, grad_norms, losses, page, rates, write_report

EVIL = "<script>document.title='broken'</script>&amp;"


def step(number: int, *, grad_norms: tuple[float, ...] = (0.5,)) -> StepMetrics:
    return StepMetrics(
        step=number,
        num_steps=4,
        losses=(4.0 / number,),
        learning_rates=(0.001 * number,),
        grad_norms=grad_norms,
        num_tokens=100,
        duration_s=0.5,
    )


def finished(*, grad_norms: tuple[float, ...] = (0.5,)) -> Finished:
    questions = (
        Question(prompt_ids=(1,), answer_contains="火曜", max_new_tokens=5, text="休みは?"),
        Question(prompt_ids=(1,), answer_contains=None, max_new_tokens=5, text=EVIL, reference=EVIL),
    )
    before = Evaluation(loss=3.5, num_right=0, num_questions=2, answers=("わかりません。", "?"))
    after = Evaluation(loss=1.25, num_right=2, num_questions=2, answers=("休みは火曜です。", EVIL))
    metrics = {"training_s": 3725.0, "tokens_per_s": 1234.4, "seed": 7.0}
    plan = {
        "decisions": [{"field": "r", "value": "8", "reason": "量子化 <b>", "source": "you"}],
        "memory": {
            "device": "the CPU",
            "items": [
                {"name": "weights", "num_bytes": 2**29, "formula": "fp32"},
                {"name": "nothing", "num_bytes": 0, "formula": ""},
            ],
            "available_bytes": 2**31,
            "total_bytes": 2**29,
        },
    }
    manifest = plain_manifest().model_copy(
        update={"version": 3, "metrics": metrics, "plan": plan, "files": {"adapter_model.safetensors": "ab" * 32}}
    )
    history = tuple(step(i, grad_norms=grad_norms) for i in (1, 2, 3, 4))
    outcome = Outcome(before=before, after=(after,), history=history, held_out=(HeldOut(step=2, loss=2.0),))
    return Finished(manifest=manifest, questions=questions, outcome=outcome)


class Reader(HTMLParser):
    """Collects the tags, the texts, and whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_one_file_that_fetches_and_runs_nothing() -> None:
    reader = Reader()
    reader.feed(page(finished()))
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert all(place.startswith("#") for place in reader.fetched)  # parts of the plots
    assert "url(http" not in page(finished())
    assert reader.tags.count("svg") == 3


def test_texts_are_shown_as_they_are() -> None:
    reader = Reader()
    reader.feed(page(finished()))
    shown = "".join(reader.texts)
    assert shown.count(EVIL) == 3  # asked, expected and, in the end, answered
    for text in ("休みは?", "火曜", "わかりません。", "休みは火曜です。", "量子化 <b>"):
        assert text in shown


def test_the_numbers_are_those_of_the_run() -> None:
    reader = Reader()
    reader.feed(page(finished()))
    shown = " ".join(reader.texts)
    for text in ("3.5000 → 1.2500", "0 → 2 of 2", "1 h 2 min", "1,234 tokens/s", "0.50", "of 2.00 available"):
        assert text in shown
    assert "nothing" not in shown
    for text in (
        "tiny:shop@3",
        "kajiya chat tiny:shop@3",
        "0" * 64,
        "train.jsonl",
        "ab12",
        "adapter_model.safetensors",
    ):
        assert text in shown
    marks = [text.strip() for text in reader.texts if text.strip() in {"✔", "✘"}]
    assert marks == ["✘", "✔", "✘", "✔"]


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_the_curves_are_drawn_from_the_history() -> None:
    run = finished()
    training, held_out = (points(line) for line in losses(run.outcome).axes[0].lines)
    assert training == [(1, 4.0), (2, 2.0), (3, 4.0 / 3), (4, 1.0)]
    assert held_out == [(0, 3.5), (2, 2.0), (4, 1.25)]
    rate = points(rates(run.outcome).axes[0].lines[0])
    assert [number for _, number in rate] == pytest.approx([0.001, 0.002, 0.003, 0.004])


def test_the_line_above_which_a_gradient_was_clipped_is_the_runs_own() -> None:
    figure = grad_norms(finished().outcome, max_norm=0.3)
    assert figure is not None
    norms, line = (points(line) for line in figure.axes[0].lines)
    assert norms == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
    assert {height for _, height in line} == {0.3}


def test_a_model_of_its_own_is_named_and_served_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished()
    plan = run.manifest.plan | {"method": "full", "warnings": ["500 steps <i> would be too many"]}
    whole = replace(run, manifest=run.manifest.model_copy(update={"plan": plan}))
    text = page(whole)
    for said in ("Training of tiny-shop-v3", "kajiya up tiny-shop-v3\n", "500 steps &lt;i&gt; would be too many"):
        assert said in text
    assert "promote" not in text
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path))
    assert write_report(whole) == tmp_path / "reports" / "tiny" / "shop-v3.html"


def test_without_gradient_norms_or_questions_there_is_neither_plot_nor_table() -> None:
    run = finished(grad_norms=())
    assert grad_norms(run.outcome, max_norm=1.0) is None
    assert page(run).count("<svg") == 2
    silent = Evaluation(loss=1.0, num_right=0, num_questions=0, answers=())
    outcome = Outcome(before=silent, after=(silent,), history=run.outcome.history)
    text = page(Finished(manifest=run.manifest, questions=(), outcome=outcome))
    assert "right answers" not in text
    assert "before and after" not in text


def test_the_page_lies_below_the_home_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path))
    path = write_report(finished())
    assert path == tmp_path / "reports" / "tiny" / "shop@3.html"
    assert re.match("<!doctype html>", path.read_text(encoding="utf-8"))
    write_page("again", path)
    assert [file.name for file in path.parent.iterdir()] == ["shop@3.html"]
