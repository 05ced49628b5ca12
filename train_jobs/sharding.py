"""What to do where no worker holds a parameter whole, under ZeRO-3 and FSDP."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from cluster.models.whole_model import WholeModel
from train_jobs.fsdp import gathered
from train_jobs.pack import Pack
from train_jobs.strategy import is_zero3

STATE_PREFIX = "model."
"""Where `PackLoss` holds the model."""


def write_trained(pack: Pack, slot: int, folder: Path) -> None:
    """Write the adapter in `slot`, or the whole model, into `folder`. Every worker must call it; the main one writes.

    Raises:
        OSError: The folder cannot be written.
    """
    card, bank = pack.job.card, pack.bank
    if isinstance(bank, WholeModel):
        weights = _gathered(pack)
        if pack.accelerator.is_main_process:
            bank.save(folder, {name.removeprefix(STATE_PREFIX): tensor for name, tensor in weights.items()})
        return
    with _whole_adapters(pack):
        if pack.accelerator.is_main_process:
            bank.save_slot(slot, folder, base_model_name_or_path=card.model_id, revision=card.revision)


def _gathered(pack: Pack) -> Mapping[str, torch.Tensor]:
    """Return all weights in the main worker's RAM."""
    if isinstance(pack.module, FSDPModule):
        return gathered(pack.module)
    if is_zero3(pack.accelerator):
        weights: Mapping[str, torch.Tensor] = pack.accelerator.get_state_dict(pack.module) or {}
        return weights
    return pack.loss.state_dict()


def _whole_adapters(pack: Pack) -> AbstractContextManager[None]:
    if not is_zero3(pack.accelerator):
        return nullcontext()
    from deepspeed import zero  # takes seconds to import

    gathered: AbstractContextManager[None] = zero.GatheredParameters(list(pack.bank.parameters()))
    return gathered
