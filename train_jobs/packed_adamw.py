"""AdamW for weights that hold many adapters, each with its own learning rate, decay, clipping and step count.

K = adapters; every parameter is `[K, ...]`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from train_jobs.fsdp import part


class PackedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) over parameters `[K, ...]`: to adapter k it is the AdamW of a run alone.

    Each of `param_groups` holds a list per adapter: `lr`, `weight_decay` and `num_steps`, the step that its run makes,
    counting from 1. The caller sets them, since ZeRO-3 calls `step` several times a step, for some of the parameters
    each. An adapter that is not `active` rests: its weights stay. With K = 1 the shape does not matter, so
    DeepSpeed's flattened shards pass too. Of weights in 16 bit an fp32 copy is kept, since most
    updates are smaller than what 16 bits can tell apart.

    A group of parameters may be given as a dict with `is_lora_b`, for who sets the rates.
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
            "active": [True] * num_slots,
            "is_lora_b": False,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the active adapters by their gradients."""
        if closure is not None:
            raise NotImplementedError("PackedAdamW takes no closure")
        for group in self.param_groups:
            coefficients = _coefficients(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, coefficients, group["active"], betas=group["betas"], eps=group["eps"])

    def _update(
        self,
        parameter: nn.Parameter,
        coefficients: torch.Tensor,
        active: Sequence[bool],
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["fp32"] = parameter.float()
        # Under FSDP, each worker updates its part.
        grad, weights = part(parameter.grad).float(), part(parameter)
        exact = part(state["fp32"]) if "fp32" in state else weights
        averages, squares = part(state["exp_avg"]), part(state["exp_avg_sq"])
        new = 1 - betas[0], 1 - betas[1]
        if all(active):
            exp_avg = averages.lerp_(grad, new[0])
            exp_avg_sq = squares.mul_(betas[1]).addcmul_(grad, grad, value=new[1])
        else:  # the moments of a resting adapter must not fade: it may go on
            on = torch.tensor(active).to(exact).view(-1, *[1] * (exact.dim() - 1))
            exp_avg = averages.lerp_(grad, on * new[0])
            exp_avg_sq = squares.lerp_(grad.square(), on * new[1])
        shape = (3, -1, *[1] * (exact.dim() - 1))
        step_size, root_correction, decay = coefficients.to(exact).view(shape)
        denominator = exp_avg_sq.sqrt().div_(root_correction).add_(eps)
        exact.mul_(decay).sub_(denominator.reciprocal_().mul_(exp_avg).mul_(step_size))
        if exact is not weights:
            weights.copy_(exact)

    def reset_slot(self, k: int) -> None:
        """Forget what adapter `k` has learned about its gradients, for a new one in its place."""
        for state in self.state.values():
            state["exp_avg"][k].zero_()
            state["exp_avg_sq"][k].zero_()


def _coefficients(group: dict[str, Any]) -> torch.Tensor:
    """Return step size, root of the second bias correction, and decay factor of each adapter, [3, K]."""
    beta1, beta2 = group["betas"]
    columns = []
    for lr, decay, step, on in zip(
        group["lr"], group["weight_decay"], group["num_steps"], group["active"], strict=True
    ):
        if on:
            columns.append((lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, 1 - lr * decay))
        else:
            columns.append((0.0, 1.0, 1.0))
    return torch.tensor(columns, dtype=torch.float64).T.contiguous()


@torch.no_grad()
def clip_by_adapter(parameters: Iterable[nn.Parameter], max_norms: Sequence[float]) -> torch.Tensor:
    """Scale each adapter's gradient down to its own `max_norms` [K] and return the norms [K] before.

    As `torch.nn.utils.clip_grad_norm_` does it, for each k by itself.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
    scale = (torch.tensor(max_norms).to(norms) / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
    return norms
