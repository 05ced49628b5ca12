"""A search as one page that needs nothing else: a table and four plots."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Result

from train_jobs.page import document, facts, new_figure, svg, write_page
from tune_spaces.arguments import SearchRequest
from tune_spaces.objectives import OBJECTIVES, badness, pareto
from tune_spaces.pack_plan import PackPlan
from tune_spaces.registration import Judgement
from tune_spaces.text import in_words
from tune_spaces.trial import DIVERGED_LOSS
from tune_spaces.winner import sound

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All that the page shows."""

    name: str
    request: SearchRequest
    results: tuple[Result, ...]
    best: Result
    judgement: Judgement
    version: str
    """Served name of the registered adapter."""
    spent_s: float
    predicted_s: float | None
    packs: PackPlan


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
        "Trials": f"{len(summary.results)}, {packs.num_slots} on each of {packs.num_workers} bases",
        "Best": f"{summary.version}: {_words(summary.best.config)}",
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
        ("Importance", importance_bars(summary)),
        ("What no other trial beats", front(summary)),
    )
    sections = "".join(f"<h2>{title}</h2>{svg(figure)}" for title, figure in plots if figure is not None)
    return document(f"Search {summary.name}", f"{facts(told)}{sections}<h2>Trials</h2>{table(summary)}")


def table(summary: Summary) -> str:
    """Return the trials, the best first."""
    objective, sign = summary.request.objective, 1 if summary.request.mode == "min" else -1
    done = [result for result in summary.results if result.metrics and objective in result.metrics]
    fields = sorted({field for result in done for field in result.config})
    names = summary.request.objectives
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", *fields, "steps", *names, "front"))
    kept = sound(done, names)
    unbeaten = {kept[i].metrics["trial_id"] for i in pareto([badness(names, result.metrics) for result in kept])}
    lines = []
    for result in sorted(done, key=lambda r: sign * r.metrics[objective]):
        cells = [result.metrics["trial_id"], *(_short(result.config.get(field, "")) for field in fields)]
        cells += [str(result.metrics["step"]), *(_short(result.metrics.get(name, "")) for name in names)]
        cells.append("●" if result.metrics["trial_id"] in unbeaten else "")
        mark = ' class="best"' if result is summary.best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def curves(summary: Summary) -> "Figure":
    """Return the objective of every trial over its steps; stopped ones end early."""
    figure, axes = new_figure()
    objective = summary.request.objective
    for result in summary.results:
        history = result.metrics_dataframe
        if history is None or objective not in history:
            continue
        finite = history[history["held_out_loss"] < DIVERGED_LOSS]
        is_best = result is summary.best
        style = {"color": "#1b7837", "linewidth": 2.5, "zorder": 3} if is_best else {"color": "#9970ab", "alpha": 0.6}
        axes.plot(finite["step"], finite[objective], marker="o", **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(objective)
    return figure


def parallel_coordinates(summary: Summary) -> "Figure | None":
    """Return one line per trial through its values, the better the darker; None with fewer than two fields."""
    trials = sound(summary.results, summary.request.objectives)
    fields = [field for field in sorted({f for r in trials for f in r.config}) if len(_values(trials, field)) > 1]
    if len(fields) < 2 or len(trials) < 2:
        return None
    figure, axes = new_figure()
    places = [{value: rank for rank, value in enumerate(_values(trials, field))} for field in fields]
    order = sorted(trials, key=lambda r: badness(summary.request.objectives, r.metrics), reverse=True)
    for rank, result in enumerate(order):
        heights = [place[result.config[field]] / (len(place) - 1) for field, place in zip(fields, places, strict=True)]
        goodness = rank / (len(order) - 1)
        axes.plot(
            range(len(fields)), heights, color=(0.1, 0.47, 0.22, 0.1 + 0.9 * goodness**2), linewidth=1 + 2 * goodness
        )
    axes.set_xticks(range(len(fields)), [f"{f}\n{_range(trials, f)}" for f in fields])
    axes.set_yticks([])
    return figure


def importance_bars(summary: Summary) -> "Figure | None":
    """Return how much of the objective each field explains; None where there are too few trials to say."""
    shares = importances(summary)
    if not shares:
        return None
    figure, axes = new_figure(height=1 + 0.4 * len(shares))
    names = sorted(shares, key=lambda field: shares[field])
    axes.barh(names, [shares[name] for name in names], color="#762a83")
    axes.set_xlabel("share (PED-ANOVA)")
    return figure


def importances(summary: Summary) -> dict[str, float]:
    """Return each field's share by PED-ANOVA (arXiv:2304.10255), as Optuna computes it."""
    trials = sound(summary.results, summary.request.objectives)
    varied = [field for field in trials[0].config if len(_values(trials, field)) > 1] if trials else []
    if len(trials) < 4 or len(varied) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    distributions = {field: _distribution(optuna, _values(trials, field)) for field in varied}
    for result in trials:
        params = {field: result.config[field] for field in varied}
        value = badness(summary.request.objectives, result.metrics)[0]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=True)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def rule(request: SearchRequest) -> str:
    """Return in words which trial is registered."""
    first, *others = request.objectives
    if not others:
        return f"the best {first}"
    near = f"at most {request.within:.2%} worse than the best {first}" if request.within else f"with the best {first}"
    return f"of the trials {near}, the best {', then '.join(others)}"


def front(summary: Summary) -> "Figure":
    """Return the second objective (by default the adapter's size) against the first; the trials that no other beats
    in both are joined by a line.
    """
    figure, axes = new_figure()
    first, second = (*summary.request.objectives, "adapter_bytes")[:2]
    trials = sound(summary.results, (first, second))
    axes.scatter([r.metrics[second] for r in trials], [r.metrics[first] for r in trials], color="#9970ab")
    best = pareto([badness((first, second), r.metrics) for r in trials])
    kept = sorted((trials[i] for i in best), key=lambda r: r.metrics[second])
    axes.step([r.metrics[second] for r in kept], [r.metrics[first] for r in kept], where="post", color="#1b7837")
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    return figure


def _values(trials: Sequence[Result], field: str) -> list[Any]:
    return sorted({result.config[field] for result in trials if field in result.config})


def _range(trials: Sequence[Result], field: str) -> str:
    values = _values(trials, field)
    return f"{_short(values[0])} … {_short(values[-1])}"


def _distribution(optuna: Any, values: list[Any]) -> Any:
    if all(isinstance(value, float) for value in values):
        return optuna.distributions.FloatDistribution(values[0], values[-1], log=values[0] > 0)
    return optuna.distributions.CategoricalDistribution(values)


def _words(config: dict[str, Any]) -> str:
    return ", ".join(f"{field}={_short(value)}" for field, value in config.items())


def _short(value: Any) -> str:
    if isinstance(value, float) and not isinstance(value, bool) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)
