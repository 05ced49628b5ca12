"""The LoRA updates of a pack of adapters, added to a frozen linear layer's output as one autograd function.

N = tokens of the pass, K = slots of the bank, R = largest rank, d = inputs, o = outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cluster.models.gating import gated, gated_grads


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Which of the N tokens belong to which adapter: contiguous blocks, in order, of any size."""

    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    """Tokens of each block; they add up to N."""
    scaling: tuple[float, ...]
    """Of each block's adapter, over the share of its inputs that dropout keeps."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.slots, self.scaling, strict=True))


class LoraLinear(torch.autograd.Function):
    """`x W^T + bias + scaling * (mask * x) A^T B`, with `W` and `bias` frozen; given `up`, of `silu(x) * up` for x.

    To autograd, base and update are two branches: each keeps a result of its own, and their sum, forwards and
    backwards, is one more pass over memory. Here the small products are added where the large ones were written. What
    is kept is `x` (and `up`), which other layers keep too, and a byte per value for its dropout.
    """

    @staticmethod
    def forward(  # noqa: D102 -- the class says it
        ctx: Any,
        x: torch.Tensor,  # [N, d]
        up: torch.Tensor | None,  # [N, d]
        weight: torch.Tensor,  # [o, d]
        bias: torch.Tensor | None,  # [o]
        lora_a: torch.Tensor,  # [K, R, d]
        lora_b: torch.Tensor,  # [K, R, o]
        mask: torch.Tensor | None,  # [N, d], bool
        blocks: Blocks,
    ) -> torch.Tensor:
        inputs = x if up is None else gated(x, up)
        result = functional.linear(inputs, weight, bias)  # [N, o]
        hidden = add_updates(result, _dropped(inputs, mask), lora_a, lora_b, blocks)
        ctx.save_for_backward(x, up, hidden, weight, lora_a, lora_b, mask)
        ctx.blocks = blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x, up, hidden, weight, lora_a, lora_b, mask = ctx.saved_tensors
        inputs = _dropped(x if up is None else gated(x, up), mask)
        grad_hidden, grad_a, grad_b = update_grads(grad, inputs, hidden, lora_a, lora_b, ctx.blocks)
        del inputs
        grad_x = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight)
            if mask is None:
                _add_products(grad_x, grad_hidden, lora_a, ctx.blocks)
            else:
                grad_x += _products(grad_hidden, lora_a, ctx.blocks) * mask
            if up is not None:
                grad_x, grad_up = gated_grads(grad_x, x, up)
        return grad_x, grad_up, None, None, grad_a, grad_b, None, None


class LoraUpdate(torch.autograd.Function):
    """`result + scaling * (mask * x) A^T B`, where quantization or a 16-bit type keeps the base product apart."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        result: torch.Tensor,  # [N, o]
        x: torch.Tensor,  # [N, d]
        lora_a: torch.Tensor,  # [K, R, d]
        lora_b: torch.Tensor,  # [K, R, o]
        mask: torch.Tensor | None,  # [N, d], bool
        blocks: Blocks,
    ) -> torch.Tensor:
        ctx.mark_dirty(result)
        hidden = add_updates(result, _dropped(x, mask).to(lora_a.dtype), lora_a, lora_b, blocks)
        ctx.save_for_backward(x, hidden, lora_a, lora_b, mask)
        ctx.blocks = blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x, hidden, lora_a, lora_b, mask = ctx.saved_tensors
        dropped = _dropped(x, mask).to(lora_a.dtype)
        grad_hidden, grad_a, grad_b = update_grads(grad.to(lora_b.dtype), dropped, hidden, lora_a, lora_b, ctx.blocks)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = _dropped(_products(grad_hidden, lora_a, ctx.blocks), mask).to(x.dtype)
        return grad, grad_x, grad_a, grad_b, None, None


def add_updates(
    result: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, blocks: Blocks
) -> torch.Tensor:
    """Add each block's `scaling * x A^T B` to `result` in place; return `scaling * x A^T`, [N, R]."""
    hidden = x.new_empty(len(x), lora_a.shape[1])
    for (slot, scaling), rows, out in zip(blocks, _split(x, blocks), _split(hidden, blocks), strict=True):
        torch.mm(rows, lora_a[slot].T, out=out).mul_(scaling)
    _add_products(result, hidden, lora_b, blocks)
    return hidden


def update_grads(
    grad: torch.Tensor,  # [N, o]
    x: torch.Tensor,  # [N, d]
    hidden: torch.Tensor,  # [N, R], as `add_updates` returned it
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    blocks: Blocks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x A^T [N, R], of A and of B; those of adapters that are not in the pass are 0."""
    grad_hidden = torch.empty_like(hidden)
    grad_a, grad_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    parts = zip(*(_split(tensor, blocks) for tensor in (grad, x, hidden, grad_hidden)), strict=True)
    for (slot, scaling), (grad_k, x_k, hidden_k, out) in zip(blocks, parts, strict=True):
        torch.mm(grad_k, lora_b[slot].T, out=out).mul_(scaling)
        torch.mm(out.T, x_k, out=grad_a[slot])
        torch.mm(hidden_k.T, grad_k, out=grad_b[slot])
    return grad_hidden, grad_a, grad_b


def _products(hidden: torch.Tensor, weights: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Return each block of `hidden` [N, R] times its slot of `weights` [K, R, width]."""
    result = hidden.new_empty(len(hidden), weights.shape[2])
    for (slot, _), rows, out in zip(blocks, _split(hidden, blocks), _split(result, blocks), strict=True):
        torch.mm(rows, weights[slot], out=out)
    return result


def _add_products(result: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, blocks: Blocks) -> None:
    """Add to `result` [N, width], in place and in its type, what `_products` returns."""
    if result.dtype != hidden.dtype:
        result += _products(hidden, weights, blocks)
        return
    for (slot, _), rows, out in zip(blocks, _split(hidden, blocks), _split(result, blocks), strict=True):
        out.addmm_(rows, weights[slot])


def _split(tensor: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = tensor.split_with_sizes(blocks.sizes)
    return parts


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask
