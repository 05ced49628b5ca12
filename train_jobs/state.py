"""What a step changes, whole and on the CPU, however the workers share it: read and put back under any strategy.

A checkpoint of one strategy and number of workers is so readable under every other.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from train_jobs.fsdp import like, part, whole
from train_jobs.pack import Pack
from train_jobs.packed_adamw import MOMENTS
from train_jobs.strategy import is_zero3


def read_state(pack: Pack) -> dict[str, Any]:
    """Return weights, moments and step counts; with several workers all must call it, and each gets the whole."""
    parameters = list(_trained(pack))
    scaler = pack.accelerator.scaler
    return {
        "weights": [_weight(pack, parameter) for parameter in parameters],
        **{name: [_moment(pack, parameter, name) for parameter in parameters] for name in MOMENTS},
        "num_steps": list(pack.optimizer.param_groups[0]["num_steps"]),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def write_state(pack: Pack, state: dict[str, Any]) -> None:
    """Put back what `read_state` returned; all workers must call it."""
    parameters = list(_trained(pack))
    if _is_deepspeed(pack):
        _make_room_for_moments(pack)
    for parameter, weight in zip(parameters, state["weights"], strict=True):
        _set_weight(pack, parameter, weight)
    for name in MOMENTS:
        for parameter, moment in zip(parameters, state[name], strict=True):
            _set_moment(pack, parameter, name, moment.to(parameter.device))
    for group in pack.optimizer.param_groups:
        group["num_steps"] = list(state["num_steps"])
    if pack.accelerator.scaler is not None and state["scaler"] is not None:
        pack.accelerator.scaler.load_state_dict(state["scaler"])


def write_weights(pack: Pack, state: dict[str, Any]) -> None:
    """Put back the weights of `read_state` alone, for a run that ends with them."""
    for parameter, weight in zip(_trained(pack), state["weights"], strict=True):
        _set_weight(pack, parameter, weight)


def _trained(pack: Pack) -> Iterator[nn.Parameter]:
    return (parameter for parameter in pack.loss.parameters() if parameter.requires_grad)


def _is_deepspeed(pack: Pack) -> bool:
    return bool(pack.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _weight(pack: Pack, parameter: nn.Parameter) -> torch.Tensor:
    if _is_deepspeed(pack):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).cpu()  # type: ignore[no-any-return]
    return whole(pack.adamw.state[parameter].get("fp32", parameter.detach())).cpu()


def _set_weight(pack: Pack, parameter: nn.Parameter, weight: torch.Tensor) -> None:
    weight = weight.to(parameter.device)
    if not _is_deepspeed(pack):
        part(parameter.data).copy_(part(like(parameter, weight)))
        if parameter.dtype != torch.float32:
            pack.adamw.state[parameter]["fp32"] = like(parameter, weight)
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    # The shard that the optimizer works on, and what the forward pass reads, which is another copy.
    if is_zero3(pack.accelerator):
        safe_set_local_fp32_param(parameter, _part(pack, weight))
    else:
        safe_set_full_fp32_param(parameter, weight)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if parameter.numel() == weight.numel():
            parameter.data.copy_(weight)


def _part(pack: Pack, whole: torch.Tensor) -> torch.Tensor:
    """Return this worker's part under ZeRO-3: all are of one length, the last one filled up with zeros."""
    length = -(-whole.numel() // pack.accelerator.num_processes)
    start = length * pack.accelerator.process_index
    mine = whole.flatten()[start : start + length]
    return nn.functional.pad(mine, (0, length - mine.numel()))


def _moment(pack: Pack, parameter: nn.Parameter, name: str) -> torch.Tensor:
    if _is_deepspeed(pack):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, name).cpu()  # type: ignore[no-any-return]
    # A parameter that no sample has reached yet has none.
    return whole(pack.adamw.state[parameter].get(name, torch.zeros_like(parameter))).cpu()


def _set_moment(pack: Pack, parameter: nn.Parameter, name: str, moment: torch.Tensor) -> None:
    if not _is_deepspeed(pack):
        pack.adamw.state[parameter][name] = like(parameter, moment)
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_zero3(pack.accelerator):
        safe_set_local_optimizer_state(parameter, _part(pack, moment), name)
    else:
        safe_set_full_optimizer_state(parameter, moment, name)


def _make_room_for_moments(pack: Pack) -> None:
    # DeepSpeed makes the moments in its first step, which a resumed run has not made; below stage 3 it then links each
    # parameter to its part of them.
    zero: Any = pack.optimizer.optimizer  # type: ignore[attr-defined]
    shards = zero.fp32_partitioned_groups_flat if is_zero3(pack.accelerator) else zero.single_partition_of_fp32_groups
    for shard in shards:
        pack.adamw.state[shard] = {name: torch.zeros_like(shard) for name in MOMENTS}
    if not is_zero3(pack.accelerator):
        zero._lazy_init_hp_params_optimizer_state()
