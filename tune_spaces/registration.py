"""The end of a search: the kept trial beside the plan's own values and the bare base, and into the registry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.tune import Result

from cluster.plan import TrainingPlan
from cluster.registry import AdapterVersion
from train_jobs.evaluate import Evaluation
from train_jobs.loop import Outcome
from train_jobs.prepare import Data
from train_jobs.progress import StepMetrics, announce
from train_jobs.register import register
from tune_spaces.arguments import SearchRequest
from tune_spaces.launched_trial import read_outcome
from tune_spaces.shared import Shared
from tune_spaces.text import words
from tune_spaces.trial_jobs import ADAPTER_FOLDER
from tune_spaces.winner import adapter_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """How the kept trial does on the held-out part, and what it is compared with."""

    base: Evaluation
    best: Evaluation
    baseline_loss: float | None
    """Of the trial with the plan's own values; None where it did not reach its first report."""
    baseline_step: int
    """Optimizer steps it made."""

    def in_words(self) -> str:
        """Return the comparison in one clause."""
        if self.baseline_loss is None:
            return "the plan's own values did not reach their first report"
        return f"the plan's own values reach {self.baseline_loss:.4f} in {self.baseline_step} steps"


def judge(shared: Shared, best: Result, baseline: Result | None) -> Judgement:
    """Return how the adapters of both trials do, evaluated anew on a pack worker with a free slot; trials that are
    runs of their own were evaluated at the end of the run.
    """
    if shared.launch is not None:
        outcome = _outcome(best)
        base, after = outcome.before, outcome.after[0]
        own = [] if baseline is None else [_outcome(baseline).after[0].loss]
    else:
        worker = shared.workers[0]
        asked = [worker.evaluation.remote(None), worker.evaluation_of.remote(adapter_files(best))]
        if baseline is not None:
            asked.append(worker.held_out_loss_of.remote(adapter_files(baseline)))
        base, after, *own = ray.get(asked)
    return Judgement(
        base=base,
        best=after,
        baseline_loss=own[0] if own else None,
        baseline_step=baseline.metrics["step"] if baseline is not None else 0,
    )


def _outcome(result: Result) -> Outcome:
    with result.checkpoint.as_directory() as folder:
        return read_outcome(Path(folder))[1]


def register_best(
    request: SearchRequest, plan: TrainingPlan, data: Data, shared: Shared, best: Result, judgement: Judgement
) -> AdapterVersion:
    """Return the version that the adapter of `best` has become; `plan` is that of the plan's own values."""
    shape = shared.shape_with(best.config)
    with best.checkpoint.as_directory() as folder:
        version = register(
            Path(folder) / ADAPTER_FOLDER,
            request.name,
            plan=plan if shape is None else replace(plan, **asdict(shape)),
            job=shared.job_with(best.config),
            data=data,
            outcome=Outcome(before=judgement.base, after=(judgement.best,), history=(_whole_run(best.metrics),)),
            promote=request.promote,
        )
    announce(
        "registered",
        f"registered {version.served_name}: held-out loss {judgement.base.loss:.4f} -> {judgement.best.loss:.4f} "
        f"with {words(best.config)}; {judgement.in_words()}. It is served as {plan.card.name}:{request.name}",
        version=version.served_name,
        loss_before=judgement.base.loss,
        loss=judgement.best.loss,
        baseline_loss=judgement.baseline_loss,
        config=best.config,
    )
    return version


def _whole_run(metrics: Mapping[str, Any]) -> StepMetrics:
    return StepMetrics(
        step=metrics["step"],
        num_steps=metrics["step"],
        losses=(metrics["training_loss"],),
        learning_rates=(),
        grad_norms=(),
        num_tokens=metrics["num_tokens"],
        duration_s=metrics["train_s"],
    )
