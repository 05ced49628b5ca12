"""Follow a run in a tracker, from the driver: what its checkpoints hold, so that nothing is told twice or taken back.

A worker that dies begins again at its last checkpoint, behind which nothing has been told; a driver that dies finds the
same run again. The curves move on with each checkpoint.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.plan import TrainingPlan
from train_jobs.checkpoint import HeldOut, read_progress
from train_jobs.evaluate import Evaluation
from train_jobs.loop import Outcome
from train_jobs.prepare import Data
from train_jobs.progress import StepMetrics, announce
from train_jobs.run_store import RunStore
from train_jobs.scored import answered
from train_jobs.trackers import Point, Tracker, TrackerName, TrackerUnusable, open_tracker

POLL_S = 5.0
"""How often it is looked whether there is a new checkpoint."""


@dataclass(kw_only=True, slots=True)
class Followed:
    """A run that is being followed."""

    run: RunStore
    tracker: Tracker | None
    outcome: Outcome | None = None
    """What the run came to, once it is known."""
    step: int = 0
    """The checkpoint that was told last."""
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Tell each new checkpoint until the run has ended."""
        while not self.ended.wait(POLL_S):
            self.look()

    def look(self) -> None:
        """Tell the last checkpoint, if it is new."""
        with self.trouble_is_a_warning():
            step = max(self.run.steps(), default=0)
            if self.tracker is None or step <= self.step:
                return
            try:
                progress = read_progress(self.run, step)
            except (FileNotFoundError, ValueError):  # pruned meanwhile, or unreadable; the next one has all of it
                return
            self.tracker.add(points(progress.before, progress.history, progress.held_out))
            self.step = step

    def close(self, data: Data) -> None:
        """Tell the end: the whole curves and the answers, or that there is none."""
        with self.trouble_is_a_warning():
            if self.tracker is None:
                return
            if self.outcome is not None:
                self.tracker.write({"answers": answers_table(data, self.outcome)})
                self.tracker.add(outcome_points(self.outcome))
            self.tracker.close(is_finished=self.outcome is not None)

    @contextmanager
    def trouble_is_a_warning(self) -> Iterator[None]:
        """A tracker that fails ends the tracking, not the run."""
        try:
            yield
        except (OSError, TrackerUnusable) as error:
            announce("warning", f"Tracking has ended, the run goes on: {str(error).splitlines()[0]}")
            self.tracker = None


@contextmanager
def followed(name: TrackerName | None, run: RunStore, plan: TrainingPlan, data: Data) -> Iterator[Followed]:
    """Follow `run` in the tracker `name`, if there is one; the body sets `outcome`.

    Raises:
        TrackerUnusable: The tracker does not take the run.
    """
    if name is None:
        yield Followed(run=run, tracker=None)
        return
    tracker = open_tracker(name, run.run)
    tracker.write({"plan": plan_table(plan), "data": data_table(data)})
    announce("tracking", f"curves: {tracker.place}", place=tracker.place)
    one = Followed(run=run, tracker=tracker)
    thread = threading.Thread(target=one.watch, name="tracking", daemon=True)
    thread.start()
    try:
        yield one
    finally:
        one.ended.set()
        thread.join()
        one.look()
        one.close(data)


def points(before: Evaluation | None, history: Sequence[StepMetrics], held_out: Iterable[HeldOut]) -> list[Point]:
    """Return the curves as far as they are known; held-out loss at step 0 is the bare base's."""
    found = [Point(curve="held_out/loss", step=0, value=before.loss)] if before else []
    found += [Point(curve="held_out/loss", step=look.step, value=look.loss) for look in held_out]
    for metrics in history:
        values = {
            "train/loss": metrics.losses[0],
            "train/learning_rate": metrics.learning_rates[0],
            "train/tokens_per_s": metrics.num_tokens / metrics.duration_s,
        }
        if metrics.grad_norms:
            values["train/grad_norm"] = metrics.grad_norms[0]
        found += [Point(curve=curve, step=metrics.step, value=value) for curve, value in values.items()]
    return found


def outcome_points(outcome: Outcome) -> list[Point]:
    """Return the whole curves; the last held-out loss is that of the weights that are kept."""
    found = points(outcome.before, outcome.history, outcome.held_out)
    if not outcome.held_out:
        found.append(Point(curve="held_out/loss", step=outcome.history[-1].step, value=outcome.after[0].loss))
    return found


def plan_table(plan: TrainingPlan) -> str:
    """Return every number of the plan with its reason, in Markdown."""
    rows = [(d.field, d.value, d.reason) for d in plan.decisions]
    return _table(("setting", "value", "reason"), [("model", plan.card.name, plan.card.model_id), *rows])


def data_table(data: Data) -> str:
    """Return what is trained on, in Markdown."""
    rows = {
        "file": data.file.name,
        "sha256": data.file.sha256,
        "format": data.file.format,
        "samples": len(data.train.samples),
        "held out": len(data.held_out.samples),
        "trained tokens": data.train.num_trained_tokens,
    }
    return _table(("data", ""), [(name, str(value)) for name, value in rows.items()])


def answers_table(data: Data, outcome: Outcome) -> str:
    """Return the held-out questions with the answers before and after training, in Markdown."""
    before = answered(data.questions, outcome.before.answers)
    after = answered(data.questions, outcome.after[0].answers)
    rows = [(b.question, b.expected, b.answer, a.answer) for b, a in zip(before, after, strict=True)]
    return _table(("question", "expected", "before", "after"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(c).replace("|", "\\|").split()) for c in row) + " |" for row in cells
    )
