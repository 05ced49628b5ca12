"""FSDP (torch's `fully_shard`): each worker holds a part of every weight, and fetches a layer when it is at work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cluster.models.bank import AdapterBank
from cluster.models.whole_model import WholeModel
from train_jobs.loss import PackLoss


def shard(loss: PackLoss, bank: AdapterBank | WholeModel, device: torch.device) -> None:
    """Shard each layer of `loss`, in place, then what is left: embeddings, last norm and head, which may be tied.

    Adapters stay whole on every worker, which has to average their gradients: they are small, and the slots of a pack
    are not to be torn apart.
    """
    kept = set(bank.parameters()) if isinstance(bank, AdapterBank) else set()
    for parameter in kept:  # the base is loaded on the CPU, and moved layer by layer when it is sharded
        parameter.data = parameter.data.to(device)
    names = set(loss.model._no_split_modules or ())
    for module in list(loss.modules()):
        if type(module).__name__ in names:
            fully_shard(module, ignored_params=kept)
    # What is left would stay whole after a forward pass, until a backward pass that an evaluation does not make.
    fully_shard(loss, ignored_params=kept, reshard_after_forward=True)


def average_gradients(bank: AdapterBank | WholeModel) -> None:
    """Give the adapters of all workers the mean of their gradients; FSDP itself does so for what it shards."""
    if isinstance(bank, WholeModel):
        return
    for parameter in bank.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(torch.distributed.get_world_size())


@contextmanager
def embeddings_and_head(module: nn.Module) -> Iterator[None]:
    """Inside, the model may run without the loss around it, whose pass fetches embeddings, last norm and head."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gathered(module: FSDPModule) -> Mapping[str, torch.Tensor]:
    """Return all weights of `module` in the first worker's RAM; all workers must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(Mapping[str, torch.Tensor], get_model_state_dict(cast(nn.Module, module), options=options))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` from its parts; all workers must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return `whole` in parts as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return whole.clone()
    # Every worker has the whole already: nothing is sent.
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this worker's part of `tensor`, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
