"""What a run needs to go on as if nothing had happened.

There is no random state and no position in the data in it: order, dropout and start of each adapter follow from its
seed and the step. Nor is there a scheduler's: the rate follows from the step.
"""

import contextlib
import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from pydantic import TypeAdapter

from train_jobs.evaluate import Evaluation
from train_jobs.pack import Pack
from train_jobs.progress import StepMetrics, announce
from train_jobs.run_store import RECORD_FILE, RunStore
from train_jobs.state import read_state, write_state, write_weights

Value = TypeVar("Value")

STATE_FILE = "state.pt"
NUM_KEPT = 2
"""Checkpoints that stay: the last one, and one more should it be unreadable. The best one stays besides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The loss on the held-out part in the midst of training."""

    step: int
    loss: float


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    before: Evaluation | None = None
    """The bare base on the held-out part."""
    history: list[StepMetrics] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)

    @property
    def best(self) -> HeldOut | None:
        """Return the first of the lowest losses on the held-out part."""
        return min(self.held_out, key=lambda held_out: (held_out.loss, held_out.step), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """Written after everything else of a checkpoint."""

    progress: Progress
    sha256: str
    """Of the state."""


_RECORD = TypeAdapter(_Record)


def save(pack: Pack, progress: Progress, run: RunStore) -> None:
    """Keep a checkpoint; all workers must call this at the same steps, and the first one writes it.

    A store that does not take it costs the checkpoint, not the run: the one before stays.
    """
    state = read_state(pack)
    if not pack.accelerator.is_main_process:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / STATE_FILE
            _write(state, path)
            record = _RECORD.dump_json(_Record(progress=progress, sha256=_sha256(path)))
            run.save(progress.step, Path(folder), record)
    except OSError as error:
        announce(
            "warning",
            f"No checkpoint after step {progress.step}: {run.uri} cannot be written ({error.strerror or error}). The "
            f"run goes on; if it is killed, it begins again after step {max(run.steps(), default=0)}.",
        )
        return
    kept = run.steps()[-NUM_KEPT:] + ([progress.best.step] if progress.best else [])
    with contextlib.suppress(OSError):  # what could not be deleted goes with the next one
        run.prune(kept)


def read_progress(run: RunStore, step: int) -> Progress:
    """Return how far the run was at the checkpoint of `step`, without its weights; raises `OSError`, `ValueError`."""
    return _RECORD.validate_json(run.read_checkpoint_record(step)).progress


def restore(pack: Pack, run: RunStore) -> Progress:
    """Return how far the run is, with its weights and optimizer put back; a new run is at step 0."""
    step = _agree(pack, _last_whole(run) if pack.accelerator.is_main_process else None)
    if step is None:
        return Progress()
    state, progress = _read(run, step)
    write_state(pack, state)
    return progress


def restore_best(pack: Pack, progress: Progress, run: RunStore) -> HeldOut | None:
    """Put back the weights with the lowest loss on the held-out part that are kept; return which, if any, they are."""
    kept = {progress.step, *_agree(pack, run.steps())}
    best = min((h for h in progress.held_out if h.step in kept), key=lambda h: (h.loss, h.step), default=None)
    if best is not None and best.step != progress.step:
        write_weights(pack, _read(run, best.step)[0])
    return best


def _agree(pack: Pack, value: Value) -> Value:
    """Return the first worker's `value` on all of them."""
    values = [value]
    if pack.accelerator.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def _last_whole(run: RunStore) -> int | None:
    for step in reversed(run.steps()):
        try:
            _read(run, step)
        except (OSError, ValueError) as error:
            announce("warning", f"The checkpoint after step {step} in {run.uri} is unreadable ({error}); not used.")
        else:
            return step
    return None


def _read(run: RunStore, step: int) -> tuple[dict[str, Any], Progress]:
    """Return state and progress; raises `OSError` or `ValueError` where a checkpoint is not what was written."""
    with tempfile.TemporaryDirectory() as cache:
        folder = run.checkpoint(step, Path(cache))
        record = _RECORD.validate_json((folder / RECORD_FILE).read_bytes())
        if _sha256(folder / STATE_FILE) != record.sha256:
            raise ValueError(f"{STATE_FILE} is not the file that was written")
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return state, record.progress


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
