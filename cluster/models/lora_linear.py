"""A frozen linear layer and the LoRA updates of a pack of adapters as one autograd function.

K = adapters in the pass, N = tokens of each, R = largest rank, d = inputs, o = outputs.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


class LoraLinear(torch.autograd.Function):
    """`x W^T + bias + scaling * (mask * x) A^T B`, with `W` and `bias` frozen.

    To autograd, base and update are two branches: each keeps a result of its own, and their sum, forwards and
    backwards, is one more pass over memory. Here the small products are added where the large ones were written.
    """

    @staticmethod
    def forward(  # noqa: D102 -- the class says it
        ctx: Any,
        x: torch.Tensor,  # [K, N, d]
        weight: torch.Tensor,  # [o, d]
        bias: torch.Tensor | None,  # [o]
        lora_a: torch.Tensor,  # [K, R, d]
        lora_b: torch.Tensor,  # [K, R, o]
        scaling: torch.Tensor,  # [K, 1, 1]
        mask: torch.Tensor | None,  # [K, N, d]
    ) -> torch.Tensor:
        adapted = x if mask is None else x * mask
        hidden = torch.bmm(adapted, lora_a.transpose(1, 2)).mul_(scaling)  # [K, N, R]
        result = functional.linear(x, weight, bias).baddbmm_(hidden, lora_b)  # [K, N, o]
        ctx.save_for_backward(adapted, hidden, weight, lora_a, lora_b, scaling, mask)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        adapted, hidden, weight, lora_a, lora_b, scaling, mask = ctx.saved_tensors
        grad_hidden = torch.bmm(grad, lora_b.transpose(1, 2)).mul_(scaling)  # [K, N, R]
        grad_a = torch.bmm(grad_hidden.transpose(1, 2), adapted)
        grad_b = torch.bmm(hidden.transpose(1, 2), grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, weight)
            if mask is None:
                grad_x.baddbmm_(grad_hidden, lora_a)
            else:
                grad_x.addcmul_(torch.bmm(grad_hidden, lora_a), mask)
        return grad_x, None, None, grad_a, grad_b, None, None
