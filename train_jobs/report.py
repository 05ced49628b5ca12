"""A finished run as one page: what it was, how it went, what the model answered before and after."""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.home import make_home_folder
from cluster.manifest import Manifest
from cluster.presets import MAX_GRAD_NORM
from train_jobs.job import Question
from train_jobs.loop import Outcome
from train_jobs.page import cards, document, facts, new_figure, svg, word_table, write_page
from train_jobs.progress import announce
from train_jobs.scored import answered

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure

BLUE, GREEN, GREY = "#2166ac", "#1b7837", "#999999"
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """All that the page shows."""

    manifest: Manifest
    questions: tuple[Question, ...]
    outcome: Outcome

    @property
    def is_whole_model(self) -> bool:
        """Return whether the result is a model of its own, and no adapter."""
        return bool(self.manifest.plan.get("method") == "full")

    @property
    def served_name(self) -> str:
        """Return the version as it is served."""
        manifest = self.manifest
        if self.is_whole_model:
            return f"{manifest.model}-{manifest.name}-v{manifest.version}"
        return f"{manifest.model}:{manifest.name}@{manifest.version}"


def write_report(finished: Finished) -> Path:
    """Write the page into `KAJIYA_HOME/reports` and return where it is; raises `OSError`."""
    model = finished.manifest.model
    path = make_home_folder("reports") / model / f"{finished.served_name[len(model) + 1 :]}.html"
    write_page(page(finished), path)
    return path


def tell_report(finished: Finished) -> None:
    """Write the page and announce where it is; a page that cannot be written is a warning, for all else is done."""
    try:
        path = write_report(finished)
    except OSError as error:
        announce("warning", f"No report was written: {error.strerror or error}.")
    else:
        announce("report", f"report: {path}", path=str(path))


def page(finished: Finished) -> str:
    """Return the page."""
    sections = [
        ("", _numbers(finished)),
        ("Loss", svg(losses(finished.outcome))),
        ("Learning rate", svg(rates(finished.outcome))),
        ("Gradient norm", _optional(grad_norms(finished.outcome, max_norm=_max_grad_norm(finished.manifest.plan)))),
        ("Answers before and after", _answers(finished)),
        ("Plan", _plan(finished.manifest.plan)),
        ("Data", _data(finished.manifest)),
        ("Where it comes from", _lineage(finished.manifest)),
        ("Serve it", _doors(finished)),
    ]
    body = "".join((f"<h2>{title}</h2>" if title else "") + content for title, content in sections if content)
    return document(f"Training of {finished.served_name}", body)


def _numbers(finished: Finished) -> str:
    before, after = finished.outcome.before, finished.outcome.after[0]
    metrics = finished.manifest.metrics
    values = {"held-out loss": f"{before.loss:.4f} → {after.loss:.4f}"}
    if after.num_questions:
        values["right answers"] = f"{before.num_right} → {after.num_right} of {after.num_questions}"
    values["steps"] = str(len(finished.outcome.history))
    values["training time"] = _duration(metrics["training_s"])
    values["speed"] = f"{metrics['tokens_per_s']:,.0f} tokens/s"
    return cards(values)


def losses(outcome: Outcome) -> "Figure":
    """Return the training loss at every step, and the held-out loss where it was measured."""
    figure, axes = new_figure()
    steps = [metrics.step for metrics in outcome.history]
    axes.plot(steps, [m.losses[0] for m in outcome.history], color=BLUE, linewidth=1.2, label="training (each step)")
    looks = [(0, outcome.before.loss), *((look.step, look.loss) for look in outcome.held_out)]
    looks.append((outcome.best.step if outcome.best else steps[-1], outcome.after[0].loss))
    looks.sort()
    axes.plot([s for s, _ in looks], [loss for _, loss in looks], color=GREEN, marker="o", label="held-out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def rates(outcome: Outcome) -> "Figure":
    """Return the learning rate of every step."""
    figure, axes = new_figure(height=2.2)
    axes.plot([m.step for m in outcome.history], [m.learning_rates[0] for m in outcome.history], color=BLUE)
    axes.set_xlabel("optimizer step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    return figure


def _max_grad_norm(plan: dict[str, Any]) -> float:
    return float(plan.get("regularization", {}).get("max_grad_norm", MAX_GRAD_NORM))


def grad_norms(outcome: Outcome, *, max_norm: float) -> "Figure | None":
    """Return the gradient's norm before clipping; None where nobody measured it (DeepSpeed clips by itself)."""
    if not all(metrics.grad_norms for metrics in outcome.history):
        return None
    figure, axes = new_figure(height=2.2)
    axes.plot([m.step for m in outcome.history], [m.grad_norms[0] for m in outcome.history], color=BLUE, linewidth=1)
    axes.axhline(max_norm, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("optimizer step (above the line, it was clipped)")
    axes.set_ylim(bottom=0)
    return figure


def _optional(figure: "Figure | None") -> str:
    return "" if figure is None else svg(figure)


def _answers(finished: Finished) -> str:
    before = answered(finished.questions, finished.outcome.before.answers)
    after = answered(finished.questions, finished.outcome.after[0].answers)
    if not after:
        return ""
    lines = []
    for old, new in zip(before, after, strict=True):
        texts = (old.question, old.expected, old.answer, new.answer)
        marks = ("", "", _mark(is_right=old.is_right), _mark(is_right=new.is_right))
        lines.append("".join(f"<td>{m}{html.escape(text)}</td>" for m, text in zip(marks, texts, strict=True)))
    head = "".join(f"<th>{name}</th>" for name in ("question", "expected", "before", "after"))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="words"><tr>{head}</tr>{rows}</table></div>'


def _mark(*, is_right: bool) -> str:
    return '<span class="right">✔ </span>' if is_right else '<span class="wrong">✘ </span>'


def _plan(plan: dict[str, Any]) -> str:
    decisions = word_table(
        ("setting", "value", "reason", "decided by"),
        ([d["field"], str(d["value"]), d["reason"], d["source"]] for d in plan.get("decisions", ())),
    )
    memory = plan.get("memory", {})
    parts = [
        [i["name"], f"{i['num_bytes'] / GIB:.2f}", i["formula"]] for i in memory.get("items", ()) if i["num_bytes"]
    ]
    decisions = _warnings(plan) + decisions
    if not parts:
        return decisions
    parts.append(["sum", f"{memory['total_bytes'] / GIB:.2f}", f"of {memory['available_bytes'] / GIB:.2f} available"])
    return decisions + f"<p>Memory of {html.escape(memory['device'])}:</p>" + word_table(("part", "GiB", ""), parts)


def _warnings(plan: dict[str, Any]) -> str:
    return "".join(f"<p>! {html.escape(warning)}</p>" for warning in plan.get("warnings", ()))


def _data(manifest: Manifest) -> str:
    data = manifest.data
    return facts(
        {
            "File": data.file,
            "SHA-256": data.sha256,
            "Samples": f"{data.num_samples:,} with {data.num_trained_tokens:,} trained tokens",
        }
    )


def _lineage(manifest: Manifest) -> str:
    return facts(
        {
            "Base": f"{manifest.base_model_id}, revision {manifest.base_revision or 'not pinned'}, in "
            f"{manifest.precision}, fingerprint {manifest.base_fingerprint}",
            "Adapter": json.dumps(manifest.adapter, ensure_ascii=False),
            "Files": ", ".join(f"{name} {sha256[:12]}…" for name, sha256 in sorted(manifest.files.items())),
            "Seed": f"{manifest.metrics['seed']:.0f}",
            "Libraries": ", ".join(f"{name} {version}" for name, version in manifest.library_versions.items()),
            "Registered": manifest.created_at,
        }
    )


def _doors(finished: Finished) -> str:
    manifest, served = finished.manifest, finished.served_name
    name = f"{manifest.model}:{manifest.name}"
    lines = [
        f"kajiya up {served if finished.is_whole_model else manifest.model}",
        f"kajiya chat {served}",
        f"kajiya adapters promote {served}   # from then on, {name} means this version",
        f"kajiya eval {served} --data FILE",
    ]
    if finished.is_whole_model:
        del lines[2]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
