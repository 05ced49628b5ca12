"""The one training loop, for a pack of any size."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from cluster.errors import UserError
from train_jobs.checkpoint import Progress, report, restore
from train_jobs.evaluate import Evaluation, evaluate
from train_jobs.pack import Pack
from train_jobs.progress import StepMetrics, announce, announce_step
from train_jobs.step import train_step


class DivergedError(UserError, ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished run returns to the driver; the adapters are in its last checkpoint."""

    before: Evaluation
    """The bare base."""
    after: tuple[Evaluation, ...]
    """Each adapter."""
    history: tuple[StepMetrics, ...]


def run(pack: Pack, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Train `pack` to its end, from where a killed worker left it.

    Raises:
        DivergedError: A loss became infinite or not a number.
    """
    progress = restore(pack)
    if progress.before is None:
        progress.before = evaluate(pack, tokenizer, slot=None)
        _announce_evaluation(pack, "before", progress.before)
    while progress.step < pack.num_steps:
        _step(pack, progress)
        if progress.step % pack.job.checkpoint_steps == 0 and progress.step < pack.num_steps:
            report(pack, progress)
    after = tuple(evaluate(pack, tokenizer, slot=k) for k in range(len(pack.job.adapters)))
    for evaluation in after:
        _announce_evaluation(pack, "after", evaluation)
    report(pack, progress, is_last=True)
    return Outcome(before=progress.before, after=after, history=tuple(progress.history))


def _step(pack: Pack, progress: Progress) -> None:
    steps = {slot: progress.step for slot, run in pack.runs.items() if progress.step < run.job.num_steps}
    made = train_step(pack, steps)
    metrics = StepMetrics(
        step=progress.step + 1,
        num_steps=pack.num_steps,
        losses=made.losses,
        learning_rates=made.learning_rates,
        grad_norms=made.grad_norms,
        num_tokens=made.num_tokens,
        duration_s=made.duration_s,
    )
    if not torch.tensor(metrics.losses).isfinite().all():
        raise DivergedError(
            f"The loss is {metrics.losses[0]} at step {metrics.step} of {metrics.num_steps}; nothing is registered. "
            f"Try a lower rate: --set learning_rate={max(metrics.learning_rates) / 10:.0e}."
        )
    progress.step += 1
    progress.history.append(metrics)
    if pack.accelerator.is_main_process:
        announce_step(metrics)


def _announce_evaluation(pack: Pack, when: str, evaluation: Evaluation) -> None:
    if not pack.accelerator.is_main_process:
        return
    right = f", {evaluation.num_right} of {evaluation.num_questions} answers right" if evaluation.num_questions else ""
    announce(
        "evaluation",
        f"{when} training: held-out loss {evaluation.loss:.4f}{right}",
        when=when,
        loss=evaluation.loss,
        num_right=evaluation.num_right,
        num_questions=evaluation.num_questions,
    )
