"""Cross entropy of a frozen head without its logits: a few rows at a time, and what backward needs at once.

M = labelled positions, h = hidden size, V = vocabulary.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cluster.activations import HEAD_ROWS
from cluster.models.products import linear, times


class HeadLoss(torch.autograd.Function):
    """The cross entropy [M] of `hidden` [M, h] under a head `weight` [V, h] that does not learn.

    The gradient of a position's loss is (softmax - one-hot) W, whatever its factor in the sum: it is computed with the
    logits, and the logits are forgotten. As in Liger's fused linear cross entropy (arXiv:2410.10989).
    """

    @staticmethod
    def forward(  # noqa: D102 -- the class says it
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,  # [M]
    ) -> torch.Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = linear(hidden[rows], weight, bias).float()  # [HEAD_ROWS, V]
            top = logits.amax(dim=1, keepdim=True)
            expected = targets[rows, None]
            of_target = logits.gather(1, expected)
            total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            losses[rows] = (total.log() + top - of_target)[:, 0]
            if grads is not None:
                logits.div_(total).scatter_add_(1, expected, -torch.ones_like(of_target))
                grads[rows] = times(logits.to(weight.dtype), weight)
            del logits  # before the next ones are there
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # noqa: D102
        (grads,) = ctx.saved_tensors
        return grads * grad[:, None].to(grads.dtype), None, None, None
