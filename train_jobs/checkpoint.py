"""What a run needs to go on as if nothing had happened.

There is no random state in it: order, dropout and start of each adapter follow from its seed and the step.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray.train
import torch
from accelerate.utils import DistributedType
from pydantic import TypeAdapter

from train_jobs.evaluate import Evaluation
from train_jobs.pack import Pack
from train_jobs.progress import StepMetrics

STATE_FILE = "state.pt"
PROGRESS_FILE = "progress.json"
DEEPSPEED_FOLDER = "deepspeed"


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    before: Evaluation | None = None
    """The bare base on the held-out part."""
    history: list[StepMetrics] = field(default_factory=list)


_PROGRESS = TypeAdapter(Progress)


def adapter_folder(checkpoint: Path, k: int) -> Path:
    """Return where a finished run's last checkpoint holds adapter `k` in PEFT's format."""
    return checkpoint / f"adapter-{k}"


def report(pack: Pack, progress: Progress, *, is_last: bool = False) -> None:
    """Hand a checkpoint to Ray Train, which copies it to the run's storage and counts it when all workers are done.

    Every worker must call this at the same steps.
    """
    with _staging() as folder:
        wrote = _write(pack, progress, folder)
        if is_last and pack.accelerator.is_main_process:
            _write_adapters(pack, folder)
        checkpoint = ray.train.Checkpoint.from_directory(folder) if wrote else None
        ray.train.report({"step": progress.step}, checkpoint=checkpoint)


@contextmanager
def _staging() -> Iterator[Path]:
    """Yield an empty folder of this worker, the same one each time: what a killed worker left in it goes, too."""
    context = ray.train.get_context()
    folder = Path(tempfile.gettempdir()) / f"kajiya-{context.get_experiment_name()}-{context.get_world_rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(pack: Pack, progress: Progress, folder: Path) -> bool:
    """Write this worker's part, and return whether there is one."""
    is_deepspeed = pack.accelerator.distributed_type == DistributedType.DEEPSPEED
    if is_deepspeed:  # each worker holds a part of the optimizer
        pack.module.save_checkpoint(str(folder / DEEPSPEED_FOLDER), exclude_frozen_parameters=True)  # type: ignore[operator]
    elif pack.accelerator.is_main_process:
        adapters = [parameter.detach() for parameter in pack.bank.parameters()]
        torch.save({"adapters": adapters, "optimizer": pack.optimizer.state_dict()}, folder / STATE_FILE)
    if pack.accelerator.is_main_process:
        (folder / PROGRESS_FILE).write_bytes(_PROGRESS.dump_json(progress))
    return is_deepspeed or bool(pack.accelerator.is_main_process)


def _write_adapters(pack: Pack, folder: Path) -> None:
    card = pack.job.card
    for k in range(len(pack.job.adapters)):
        pack.bank.save_slot(k, adapter_folder(folder, k), base_model_name_or_path=card.model_id, revision=card.revision)


def restore(pack: Pack) -> Progress:
    """Return how far the run is, with its weights and optimizer put back; a new run is at step 0."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as name:
        folder = Path(name)
        if pack.accelerator.distributed_type == DistributedType.DEEPSPEED:
            pack.module.load_checkpoint(str(folder / DEEPSPEED_FOLDER), load_module_strict=False)  # type: ignore[operator]
        else:
            state = torch.load(folder / STATE_FILE, map_location=pack.accelerator.device, weights_only=True)
            for parameter, saved in zip(pack.bank.parameters(), state["adapters"], strict=True):
                parameter.data.copy_(saved)
            pack.optimizer.load_state_dict(state["optimizer"])
        return _PROGRESS.validate_json((folder / PROGRESS_FILE).read_bytes())
