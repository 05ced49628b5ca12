"""The plots of a search: what each trial reached, by which values, and what it cost."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray.tune import Result

from train_jobs.page import new_figure
from tune_spaces.importance import importances, values_of
from tune_spaces.objectives import badness, pareto
from tune_spaces.text import short
from tune_spaces.trial import DIVERGED_LOSS
from tune_spaces.winner import sound

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure

    from tune_spaces.report import Summary

BEST, OWN, OTHER, AXIS = "#1b7837", "#d95f02", "#9970ab", "#bbbbbb"
LOG_FROM = 5.0
"""A range whose largest value is so many times its smallest is drawn on a log scale."""


def curves(summary: "Summary") -> "Figure":
    """Return the objective of every trial over its steps, a mark at each rung; stopped ones end early."""
    figure, axes = new_figure()
    objective = summary.request.objective
    steps: set[int] = set()
    for result in _registered_last(summary):
        history = result.metrics_dataframe
        if history is None or objective not in history:
            continue
        finite = history[history["held_out_loss"] < DIVERGED_LOSS]
        axes.plot(finite["step"], finite[objective], marker="o", markersize=5, **_style(summary, result))
        steps |= set(finite["step"])
    axes.set_xticks(sorted(steps))
    axes.grid(axis="x", color="#eeeeee")
    axes.set_xlabel("optimizer step of each rung")
    axes.set_ylabel(objective)
    _legend(axes)
    return figure


def slices(summary: "Summary") -> "Figure | None":
    """Return the objective over each field by itself; None where no field varies."""
    trials, fields = _varied(summary)
    if not fields or len(trials) < 2:
        return None
    from matplotlib.figure import Figure

    num_columns = min(3, len(fields))
    num_rows = -(-len(fields) // num_columns)
    figure = Figure(figsize=(8, 2.6 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat
    objective = summary.request.objective
    for axes, field in zip(grid, fields, strict=False):
        places = _Places(trials, field)
        for result in trials:
            style = _style(summary, result)
            axes.plot(places.at(result.config[field]), result.metrics[objective], "o", color=style["color"], alpha=0.85)
        places.mark(axes.xaxis)
        axes.set_xlabel(f"{field} (log)" if places.is_log else field)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(fields) :]:
        axes.remove()
    figure.supylabel(objective, fontsize="medium")
    return figure


def parallel_coordinates(summary: "Summary") -> "Figure | None":
    """Return one line per trial through its values to its objective, the better the darker; None with fewer than two
    fields.
    """
    trials, fields = _varied(summary)
    if len(fields) < 2 or len(trials) < 2:
        return None
    figure, axes = new_figure(height=4)
    scales = [_Places(trials, field) for field in fields]
    objective = summary.request.objective
    reached = [float(result.metrics[objective]) for result in trials]
    low, span = min(reached), (max(reached) - min(reached)) or 1.0
    order = sorted(trials, key=lambda r: badness(summary.request.objectives, r.metrics), reverse=True)
    for rank, result in enumerate(order):
        heights = [scale.share(result.config[field]) for field, scale in zip(fields, scales, strict=True)]
        goodness = rank / (len(order) - 1)
        color = BEST if result is summary.best else (0.46, 0.16, 0.51, 0.15 + 0.6 * goodness**2)
        label = "registered" if result is summary.best else None
        ends = [*heights, (float(result.metrics[objective]) - low) / span]
        axes.plot(range(len(ends)), ends, color=color, linewidth=1 + 2 * goodness, label=label)
    for place, scale in enumerate(scales):
        axes.axvline(place, color=AXIS, linewidth=1, zorder=0)
        for value in scale.marks:
            at = (place, scale.share(value))
            axes.annotate(_broken(short(value)), at, (5, 0), textcoords="offset points", fontsize=8)
    axes.axvline(len(fields), color=AXIS, linewidth=1, zorder=0)
    for value in (low, low + span):
        axes.annotate(short(value), (len(fields), (value - low) / span), (5, 0), textcoords="offset points", fontsize=8)
    names = [f"{field}\n(log)" if scale.is_log else field for field, scale in zip(fields, scales, strict=True)]
    axes.set_xticks(range(len(names) + 1), [_broken(name) for name in (*names, objective)])
    axes.set_xlim(-0.1, len(names) + 0.35)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    return figure


def importance_bars(summary: "Summary") -> "Figure | None":
    """Return how much of the objective each field explains; None where there are too few trials to say."""
    shares = importances(sound(summary.results, summary.request.objectives), summary.request.objectives)
    if not shares:
        return None
    figure, axes = new_figure(height=1 + 0.4 * len(shares))
    names = sorted(shares, key=lambda field: shares[field])
    bars = axes.barh(names, [shares[name] for name in names], color="#762a83")
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=4)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of what the objective varies by (PED-ANOVA)")
    return figure


def costs(summary: "Summary") -> "Figure | None":
    """Return what was predicted beside what was spent, in minutes; None where no step was measured."""
    if summary.predicted_s is None:
        return None
    figure, axes = new_figure(height=1.6)
    minutes = [summary.spent_s / 60, summary.predicted_s / 60]
    bars = axes.barh(["spent", "predicted"], minutes, color=[BEST, AXIS])
    axes.bar_label(bars, [f"{value:.1f} min" for value in minutes], padding=4)
    axes.set_xlim(0, 1.15 * max(minutes))
    axes.set_xlabel("minutes")
    return figure


def front(summary: "Summary") -> "Figure":
    """Return the second objective (by default the adapter's size) against the first; the trials that no other beats
    in both are joined by a line.
    """
    figure, axes = new_figure()
    first, second = (*summary.request.objectives, "adapter_bytes")[:2]
    unit, name = (2**20, "adapter (MiB)") if second == "adapter_bytes" else (1, second)
    trials = sound(summary.results, (first, second))
    axes.scatter([r.metrics[second] / unit for r in trials], [r.metrics[first] for r in trials], color=OTHER)
    best = pareto([badness((first, second), r.metrics) for r in trials])
    kept = sorted((trials[i] for i in best), key=lambda r: r.metrics[second])
    axes.step(
        [r.metrics[second] / unit for r in kept],
        [r.metrics[first] for r in kept],
        where="post",
        color=BEST,
        marker="o",
        label="no other trial is better in both",
    )
    axes.set_xlabel(name)
    axes.set_ylabel(first)
    axes.legend(frameon=False)
    return figure


class _Places:
    """Where the values of one field lie on an axis: by size, on a log scale where they span much, else by rank."""

    def __init__(self, trials: Sequence[Result], field: str) -> None:
        self.values = values_of(trials, field)
        is_range = all(isinstance(value, float) for value in self.values) and len(self.values) > 4
        self.is_log = is_range and self.values[0] > 0 and self.values[-1] / self.values[0] >= LOG_FROM
        self.is_ranked = not is_range

    @property
    def marks(self) -> list[Any]:
        """Return the values that are written on the axis."""
        return self.values if self.is_ranked else [self.values[0], self.values[-1]]

    def at(self, value: Any) -> float:
        """Return the place of a value: its rank, or itself."""
        return float(self.values.index(value)) if self.is_ranked else float(value)

    def share(self, value: Any) -> float:
        """Return the place of a value between the smallest, 0, and the largest, 1."""
        scale = math.log if self.is_log else float
        low, high = (scale(self.at(end)) for end in (self.values[0], self.values[-1]))
        return float((scale(self.at(value)) - low) / ((high - low) or 1.0))

    def mark(self, axis: Any) -> None:
        """Write the values on an axis of matplotlib's."""
        if self.is_ranked:
            axis.set_ticks(range(len(self.values)), [_broken(short(value)) for value in self.values])
        elif self.is_log:
            axis.axes.set_xscale("log")
            axis.set_ticks([], minor=True)  # the text of a narrow plot's small ticks would lie on itself
            axis.set_ticks(self.marks, [short(value) for value in self.marks])


def _broken(name: str) -> str:
    """Return `name` in several lines, so that long ones stand side by side."""
    return name.replace("_", "_\n")


def _varied(summary: "Summary") -> tuple[list[Result], list[str]]:
    trials = sound(summary.results, summary.request.objectives)
    fields = sorted({field for result in trials for field in result.config})
    return trials, [field for field in fields if len(values_of(trials, field)) > 1]


def _registered_last(summary: "Summary") -> list[Result]:
    """Return the trials in the order in which they are drawn, so that those that matter lie above the others."""
    return sorted(summary.results, key=lambda result: (result is summary.best, result is summary.baseline))


def _style(summary: "Summary", result: Result) -> dict[str, Any]:
    if result is summary.best:
        return {"color": BEST, "linewidth": 2.5, "label": "registered"}
    if result is summary.baseline:
        return {"color": OWN, "linewidth": 2.0, "linestyle": "--", "label": "the plan's own values"}
    return {"color": OTHER, "alpha": 0.6, "label": "others"}


def _legend(axes: Any) -> None:
    """Show each label once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
