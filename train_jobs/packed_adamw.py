"""AdamW for weights that hold many adapters, each with its own learning rate, decay, clipping and step count.

K = adapters, r = an adapter's own rank; every parameter is `[K, ...]`, of an adapter bank `[K, R, d]`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cluster.models.lazy_memory import lazy_zeros
from train_jobs.fsdp import part as local_part

MOMENTS = ("exp_avg", "exp_avg_sq")
"""By the names that torch's own AdamW has for them."""
Entry = tuple[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]
"""A parameter, and what takes an adapter's part from a tensor of its shape."""


class PackedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) over parameters `[K, ...]`: to adapter k it is the AdamW of a run alone.

    Each of `param_groups` holds a list per adapter: `lr`, `weight_decay` and `num_steps`, the step that its run makes,
    counting from 1. The caller sets them, since ZeRO-3 calls `step` several times a step, for some of the parameters
    each. By `grad_scale`, which `clip_by_adapter` sets, gradients are divided on their way. An adapter that is not
    `active` rests: its weights stay. With K = 1 the shape does not matter, so DeepSpeed's flattened shards pass too. Of
    weights in 16 bit an fp32 copy is kept, since most updates are smaller than what 16 bits can tell apart.

    A group of parameters may be given as a dict with `is_lora_b`, for who sets the rates, and `ranks`, a list per
    parameter of each adapter's rank: what lies beyond is neither read nor written. With `views`, an empty dict of
    the group's own, float32 weights, their moments and their gradients, set to zero where adapters were active, stay
    where they are; the dict keeps each adapter's parts of them.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        num_slots: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": [0.0] * num_slots,
            "weight_decay": [0.0] * num_slots,
            "num_steps": [1] * num_slots,
            "grad_scale": [1.0] * num_slots,
            "active": [True] * num_slots,
            "is_lora_b": False,
            "ranks": None,
            "views": None,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # noqa: ARG002 (it computes no losses)
        """Update the active adapters by their gradients."""
        for group in self.param_groups:
            for slot in _active(group):
                if group["views"] is not None:
                    weights = _views(group, slot, "weights", lambda p: p.data)
                    self._update(group, slot, weights, _grads(group, slot), self._moments(group, slot))
                    continue
                for entries in _at_a_time(_parts(group, slot)):
                    self._update_entries(group, slot, entries)

    def _update_entries(self, group: dict[str, Any], slot: int, entries: Sequence[Entry]) -> None:
        weights, exact, grads, first, second = [], [], [], [], []
        for parameter, part in entries:
            assert parameter.grad is not None
            state = self._state_of(parameter)
            weights.append(part(parameter.data))
            exact.append(part(state.get("fp32", parameter.data)))
            grads.append(part(parameter.grad).float())
            first.append(part(state["exp_avg"]))
            second.append(part(state["exp_avg_sq"]))
        self._update(group, slot, exact, grads, [first, second])
        for weight, value in zip(weights, exact, strict=True):
            if weight.dtype != value.dtype:
                weight.copy_(value)

    def _update(
        self,
        group: dict[str, Any],
        slot: int,
        exact: list[torch.Tensor],
        grads: list[torch.Tensor],
        moments: Sequence[list[torch.Tensor]],
    ) -> None:
        device, scale = exact[0].device, group["grad_scale"][slot]
        step = torch.tensor(float(group["num_steps"][slot]), device=device)
        torch._fused_adamw_(  # what `torch.optim.AdamW(fused=True)` calls: one pass over memory
            exact,
            grads,
            moments[0],
            moments[1],
            [],
            [step] * len(exact),
            lr=group["lr"][slot],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"][slot],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None if scale == 1 else torch.tensor(scale, device=device),
        )

    def _moments(self, group: dict[str, Any], slot: int) -> list[list[torch.Tensor]]:
        return [
            _views(group, slot, name, lambda p, name=name: self._state_of(p)[name])  # type: ignore[misc]
            for name in MOMENTS
        ]

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            for name in MOMENTS:
                state[name] = _zeros_like(parameter)
            if parameter.dtype != torch.float32:
                state["fp32"] = parameter.detach().float()
        return state

    def slot_moments(self, slot: int, name: str) -> dict[nn.Parameter, torch.Tensor]:
        """Return moment `name` of adapter `slot` by parameter, for reading and writing."""
        return {
            parameter: part(self._state_of(parameter)[name])
            for group in self.param_groups
            for parameter, part in _parts(group, slot)
        }

    @torch.no_grad()
    def reset_slot(self, k: int) -> None:
        """Forget what adapter `k` has learned about its gradients, for a new one in its place."""
        for group in self.param_groups:
            for parameter, part in _parts(group, k):
                moments = [self.state[parameter][name] for name in MOMENTS if name in self.state[parameter]]
                for tensor in [*moments, *([] if parameter.grad is None else [parameter.grad])]:
                    part(tensor).zero_()

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's)
        """Forget the gradients of all adapters, or where their place is kept, of those that were active."""
        if not any(group["views"] is not None for group in self.param_groups):
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for slot in _active(group):
                torch._foreach_zero_(_grads(group, slot))


def _zeros_like(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter.data, DTensor):
        return torch.zeros_like(parameter, dtype=torch.float32)
    return lazy_zeros(tuple(parameter.shape), dtype=torch.float32, device=parameter.device)


def _at_a_time(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield what is updated at a time: all that has float32 gradients, and each of the others by itself.

    Those are turned into float32 first; all of a whole model's would be twice as large as it is.
    """
    exact = []
    for entry in entries:
        if (grad := entry[0].grad) is None:
            continue
        if grad.dtype == torch.float32:
            exact.append(entry)
        else:
            yield [entry]
    if exact:
        yield exact


def _active(group: dict[str, Any]) -> list[int]:
    return [slot for slot, is_active in enumerate(group["active"]) if is_active]


def _parts(group: dict[str, Any], slot: int) -> Iterator[Entry]:
    """Yield each parameter of `group`, and what takes the part of adapter `slot`."""
    num_slots = len(group["active"])
    for number, parameter in enumerate(group["params"]):
        if group["ranks"] is not None:
            r = group["ranks"][number][slot]
            if r:
                yield parameter, lambda tensor, r=r: tensor[slot, :r]  # type: ignore[misc]
        elif num_slots == 1:
            yield parameter, local_part  # under FSDP, each worker updates its part
        else:
            yield parameter, lambda tensor: tensor[slot]


def _grads(group: dict[str, Any], slot: int) -> list[torch.Tensor]:
    return _views(group, slot, "grads", lambda p: p.grad)


def _views(
    group: dict[str, Any], slot: int, name: str, whole: Callable[[nn.Parameter], torch.Tensor | None]
) -> list[torch.Tensor]:
    """Return the parts that adapter `slot` has of what `whole` gives for each parameter, where it gives something.

    To make the parts costs more than to use them. They are kept under `name` until an adapter of other ranks comes.
    """
    if group["views"] is None:
        return [part(tensor) for p, part in _parts(group, slot) if (tensor := whole(p)) is not None]
    ranks = group["ranks"] and [of_slots[slot] for of_slots in group["ranks"]]
    kept = group["views"].get((name, slot))
    if kept is None or kept[0] != ranks:
        parts = [part(tensor) for p, part in _parts(group, slot) if (tensor := whole(p)) is not None]
        kept = group["views"][name, slot] = ranks, parts
    return kept[1]  # type: ignore[no-any-return]


@torch.no_grad()
def clip_by_adapter(
    groups: Sequence[dict[str, Any]], max_norms: Sequence[float], slots: Sequence[int]
) -> tuple[float, ...]:
    """Let the next update scale the gradient of each adapter of `slots` down to its own of `max_norms` [K].

    As `torch.nn.utils.clip_grad_norm_` does it, for each adapter by itself, and without a pass over memory of its own.
    `groups` are those of the optimizer. Returns the norms.
    """
    norms = []
    for slot in slots:
        grads = [grad for group in groups for grad in _grads(group, slot)]
        norms.append(float(torch.stack(torch._foreach_norm(grads)).norm()))
        for group in groups:
            group["grad_scale"][slot] = max(1.0, (norms[-1] + 1e-6) / max_norms[slot])
    return tuple(norms)
