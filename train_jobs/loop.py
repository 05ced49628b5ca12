"""The one training loop, for a pack of any size."""

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import ray.train
import torch
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from cluster.errors import UserError
from train_jobs.checkpoint import HeldOut, Progress, restore, restore_best, save
from train_jobs.evaluate import Evaluation, evaluate, held_out_loss
from train_jobs.interrupt import told_to_leave
from train_jobs.pack import Pack
from train_jobs.progress import StepMetrics, announce, announce_step
from train_jobs.run_store import RunStore
from train_jobs.sharding import write_trained
from train_jobs.step import train_step


class DivergedError(UserError, ArithmeticError):
    """The loss is no longer a number."""


class ResultNotKept(UserError, OSError):
    """What the run made cannot be written; its checkpoints are still there."""


class Preempted(RuntimeError):
    """The process was told to end, and has kept what there is; Ray Train starts again from there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished run tells the driver; the adapters are in its result."""

    before: Evaluation
    """The bare base."""
    after: tuple[Evaluation, ...]
    """Each adapter."""
    history: tuple[StepMetrics, ...]
    held_out: tuple[HeldOut, ...] = ()
    """The losses on the held-out part in the midst of training."""
    best: HeldOut | None = None
    """Whose weights the result holds; None: those after the last step."""


OUTCOME = TypeAdapter(Outcome)


def run(pack: Pack, tokenizer: PreTrainedTokenizerBase, store: RunStore) -> Outcome:
    """Train `pack` to its end or its job's `stop_step`, from where it was left, and keep the result in `store`.

    Raises:
        DivergedError: A loss became infinite or not a number.
        ResultNotKept: The store does not take the result.
    """
    progress = restore(pack, store)
    if progress.before is None:
        progress.before = evaluate(pack, tokenizer, slot=None)
        _announce_evaluation(pack, "before", progress.before)
    _train(pack, progress, store)
    best = restore_best(pack, progress, store)
    after = tuple(evaluate(pack, tokenizer, slot=k) for k in range(len(pack.job.adapters)))
    for evaluation in after:
        _announce_evaluation(pack, "after", evaluation)
    outcome = Outcome(
        before=progress.before,
        after=after,
        history=tuple(progress.history),
        held_out=tuple(progress.held_out),
        best=best,
    )
    _keep_result(pack, outcome, store)
    return outcome


def _train(pack: Pack, progress: Progress, store: RunStore) -> None:
    with told_to_leave() as told:
        _train_until(pack, progress, store, told)


def _train_until(pack: Pack, progress: Progress, store: RunStore, told: threading.Event) -> None:
    is_warned = False
    end = pack.job.stop_step or pack.num_steps
    while progress.step < min(end, pack.num_steps) and not _has_stalled(pack, progress):
        _step(pack, progress)
        is_best = _look(pack, progress)
        is_leaving = not is_warned and _is_node_leaving(pack, progress)
        is_warned |= is_leaving
        is_told = _is_any(pack, told.is_set())
        is_stopping = progress.step == pack.job.stop_step
        if is_best or is_leaving or is_told or is_stopping or progress.step % pack.job.checkpoint_steps == 0:
            save(pack, progress, store)
        if is_told:
            raise Preempted(f"A worker got SIGTERM; what there is after step {progress.step} is kept.")


def _is_any(pack: Pack, value: bool) -> bool:  # noqa: FBT001
    """Return whether `value` is true on one of the workers; all of them must ask at the same step."""
    if pack.accelerator.num_processes == 1:
        return value
    one = torch.tensor([float(value)], device=pack.accelerator.device)
    return bool(pack.accelerator.reduce(one).item() > 0)


def _is_node_leaving(pack: Pack, progress: Progress) -> bool:
    """Return whether a worker's node is about to be taken away; the workers agree on it."""
    info = ray.train.get_preemption_info()
    if info is None:
        return False
    if pack.accelerator.is_main_process:
        announce("warning", f"A node is about to leave; what there is after step {progress.step} is kept.")
    return True


def _look(pack: Pack, progress: Progress) -> bool:
    """Measure the loss on the held-out part, if it is time, and return whether it is the lowest so far."""
    if pack.job.eval_steps is None or progress.step % pack.job.eval_steps:
        return False
    held_out = HeldOut(step=progress.step, loss=held_out_loss(pack, slot=0))
    progress.held_out.append(held_out)
    if pack.accelerator.is_main_process:
        text = f"step {held_out.step}/{pack.num_steps}  held-out loss {held_out.loss:.4f}"
        announce("held_out", text, step=held_out.step, loss=held_out.loss)
    return progress.best == held_out


def _has_stalled(pack: Pack, progress: Progress) -> bool:
    patience, best = pack.job.early_stopping_patience, progress.best
    if patience is None or best is None:
        return False
    if sum(held_out.step > best.step for held_out in progress.held_out) < patience:
        return False
    if pack.accelerator.is_main_process:
        announce(
            "stopped_early",
            f"stopped after step {progress.step}: {patience} look{'s' * (patience != 1)} at the held-out part without "
            f"a lower loss than {best.loss:.4f} after step {best.step}",
            step=progress.step,
        )
    return True


def _keep_result(pack: Pack, outcome: Outcome, store: RunStore) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            for k in range(len(pack.job.adapters)):
                write_trained(pack, k, adapter_folder(Path(folder), k))
            if pack.accelerator.is_main_process:
                store.save_result(Path(folder), OUTCOME.dump_json(outcome))
    except OSError as error:
        raise ResultNotKept(
            f"The trained adapter cannot be written to {store.uri} ({error.strerror or error}); nothing is registered."
        ) from error


def adapter_folder(result: Path, k: int) -> Path:
    """Return where the result of a run holds adapter `k` in PEFT's format, or the whole model."""
    return result / f"adapter-{k}"


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
