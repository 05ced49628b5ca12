"""The LoRA updates of a pack of adapters, added to a frozen linear layer's output as one autograd function.

N = tokens of the pass, K = slots of the bank, R = largest rank, d = inputs, o = outputs, H = sum over the adapters of
the pass of tokens times rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cluster.models.gating import gated, gated_grads
from cluster.models.products import linear, times


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Which of the N tokens belong to which adapter: contiguous blocks, in order, of any size."""

    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    """Tokens of each block; they add up to N."""
    scaling: tuple[float, ...]
    """Of each block's adapter, over the share of its inputs that dropout keeps."""
    ranks: tuple[int, ...]
    """Of each block's adapter in the layer; 0 where it has none."""
    grads: tuple[torch.Tensor, torch.Tensor] | None = None
    """Where the gradients of A and B are added; None: autograd adds them."""

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        return iter(zip(self.slots, self.ranks, self.scaling, strict=True))

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each block's rows of `tensor` [N, ..]."""
        parts: tuple[torch.Tensor, ...] = tensor.split_with_sizes(self.sizes)
        return parts

    def split_hidden(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each block's part of `hidden` [H], as [its tokens, its rank]."""
        shapes = list(zip(self.sizes, self.ranks, strict=True))
        parts = hidden.split_with_sizes([size * rank for size, rank in shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    def new_hidden(self, like: torch.Tensor) -> torch.Tensor:
        """Return room [H] for what lies between A and B."""
        return like.new_empty(sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True)))


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
        result = linear(inputs, weight, bias)  # [N, o]
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
            grad_x = times(grad, weight)
            if mask is None:
                _add_products(grad_x, grad_hidden, lora_a, ctx.blocks)
            else:
                grad_x += _products(grad_hidden, lora_a, ctx.blocks).mul_(mask)
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
    """Add each block's `scaling * x A^T B` to `result` in place; return `scaling * x A^T`, [H]."""
    hidden = blocks.new_hidden(x)
    for (slot, r, scaling), rows, out in zip(blocks, blocks.split(x), blocks.split_hidden(hidden), strict=True):
        torch.addmm(out, rows, lora_a[slot, :r].T, beta=0, alpha=scaling, out=out)  # beta 0: `out` is not read
    _add_products(result, hidden, lora_b, blocks)
    return hidden


def update_grads(
    grad: torch.Tensor,  # [N, o]
    x: torch.Tensor,  # [N, d]
    hidden: torch.Tensor,  # [H], as `add_updates` returned it
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    blocks: Blocks,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x A^T [H], of A and of B; those of adapters that are not in the pass are 0.

    Where they have a place of their own they are added there, and None is returned: most of a large bank is not in
    the pass.
    """
    grad_hidden = torch.empty_like(hidden)
    grad_a, grad_b = blocks.grads or (torch.zeros_like(lora_a), torch.zeros_like(lora_b))
    hiddens = zip(blocks.split_hidden(hidden), blocks.split_hidden(grad_hidden), strict=True)
    parts = zip(blocks, blocks.split(grad), blocks.split(x), hiddens, strict=True)
    for (slot, r, scaling), grad_k, x_k, (hidden_k, out) in parts:
        torch.addmm(out, grad_k, lora_b[slot, :r].T, beta=0, alpha=scaling, out=out)
        grad_a[slot, :r].addmm_(out.T, x_k)
        grad_b[slot, :r].addmm_(hidden_k.T, grad_k)
    return (grad_hidden, None, None) if blocks.grads else (grad_hidden, grad_a, grad_b)


def _products(hidden: torch.Tensor, weights: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Return each block of `hidden` [H] times its slot of `weights` [K, R, width], [N, width]."""
    result = hidden.new_empty(sum(blocks.sizes), weights.shape[2])
    for (slot, r, _), rows, out in zip(blocks, blocks.split_hidden(hidden), blocks.split(result), strict=True):
        torch.mm(rows, weights[slot, :r], out=out)
    return result


def _add_products(result: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, blocks: Blocks) -> None:
    """Add to `result` [N, width], in place and in its type, what `_products` returns."""
    if result.dtype != hidden.dtype:
        result += _products(hidden, weights, blocks)
        return
    for (slot, r, _), rows, out in zip(blocks, blocks.split_hidden(hidden), blocks.split(result), strict=True):
        out.addmm_(rows, weights[slot, :r])


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask
