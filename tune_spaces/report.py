"""A search as one page that needs nothing else: what it found, a table of all trials, and plots."""

import html
from dataclasses import dataclass
from pathlib import Path

from ray.tune import Result

from train_jobs.page import document, facts, svg, write_page
from tune_spaces.arguments import SearchRequest
from tune_spaces.objectives import OBJECTIVES, badness, pareto
from tune_spaces.pack_plan import PackPlan
from tune_spaces.registration import Judgement
from tune_spaces.report_plots import costs, curves, front, importance_bars, parallel_coordinates, slices
from tune_spaces.text import in_words, short, words
from tune_spaces.winner import sound


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All that the page shows."""

    name: str
    request: SearchRequest
    results: tuple[Result, ...]
    best: Result
    baseline: Result | None
    """The trial of the plan's own values, where it kept its adapter."""
    judgement: Judgement
    version: str
    """Served name of the registered adapter."""
    spent_s: float
    predicted_s: float | None
    packs: PackPlan
    is_packed: bool
    """Whether trials shared a base; else each was a training run of its own."""


def write_report(summary: Summary, path: Path) -> None:
    """Write the page to `path`, whole or not at all."""
    write_page(page(summary), path)


def page(summary: Summary) -> str:
    """Return the page."""
    request, packs = summary.request, summary.packs
    predicted = in_words(summary.predicted_s) if summary.predicted_s else "not measured"
    told = {
        "Model": request.model,
        "Data": request.data,
        "Search": f"{request.searcher} and {request.scheduler} over the space {request.space}",
        "Trials": f"{len(summary.results)}, {places(packs, is_packed=summary.is_packed)}",
        "Best": f"{summary.version}: {words(summary.best.config)}",
        "Held-out loss": f"{summary.judgement.best.loss:.4f}; "
        f"{summary.judgement.in_words()}; the bare base {summary.judgement.base.loss:.4f}",
        "Objectives": "; ".join(f"{name} ({OBJECTIVES[name].meaning})" for name in request.objectives),
        "Registered": rule(request),
        "Predicted": predicted,
        "Spent": in_words(summary.spent_s),
    }
    plots = (
        ("Held-out loss at each rung", curves(summary)),
        ("Values and what they gave", parallel_coordinates(summary)),
        ("Each field by itself", slices(summary)),
        ("Importance of each field", importance_bars(summary)),
        ("Predicted and spent", costs(summary)),
        ("What no other trial beats", front(summary)),
    )
    sections = "".join(
        f'<section><h2>{title}</h2><div class="wide">{svg(figure)}</div></section>'
        for title, figure in plots
        if figure is not None
    )
    trials = f'<h2>Trials</h2><div class="wide">{table(summary)}</div>'
    return document(f"Search {summary.name}", f"{facts(told)}{trials}{sections}")


def table(summary: Summary) -> str:
    """Return the trials, the best first."""
    objective, sign = summary.request.objective, 1 if summary.request.mode == "min" else -1
    done = [result for result in summary.results if result.metrics and objective in result.metrics]
    fields = sorted({field for result in done for field in result.config})
    names = summary.request.objectives
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", *names, "steps", *fields, "front"))
    kept = sound(done, names)
    unbeaten = {kept[i].metrics["trial_id"] for i in pareto([badness(names, result.metrics) for result in kept])}
    lines = []
    for result in sorted(done, key=lambda r: sign * r.metrics[objective]):
        cells = [result.metrics["trial_id"], *(short(result.metrics.get(name, "")) for name in names)]
        cells += [str(result.metrics["step"]), *(short(result.config.get(field, "")) for field in fields)]
        cells.append("●" if result.metrics["trial_id"] in unbeaten else "")
        mark = ' class="best"' if result is summary.best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def places(packs: PackPlan, *, is_packed: bool) -> str:
    """Return in words how many trials were trained at a time."""
    bases = f"{packs.num_workers} base{'s' * (packs.num_workers != 1)}"
    if is_packed:
        return f"{packs.num_slots} at a time on {'each of ' * (packs.num_workers > 1)}{bases}"
    return f"each a training run of its own, {packs.num_workers} at a time"


def rule(request: SearchRequest) -> str:
    """Return in words which trial is registered."""
    first, *others = request.objectives
    if not others:
        return f"the best {first}"
    near = f"at most {request.within:.2%} worse than the best {first}" if request.within else f"with the best {first}"
    return f"of the trials {near}, the best {', then '.join(others)}"
