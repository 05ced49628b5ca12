"""`silu(gate) * up`, the middle of a gated MLP (arXiv:2002.05202), computed again in backward instead of kept.

N = tokens, I = intermediate size.
"""

import torch
from torch.nn import functional

ROWS = 64
"""Tokens at a time: what lies between gate and product stays in a core's cache."""


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(`gate`) * `up`, all [N, I]."""
    out = torch.empty_like(gate)
    for gate_rows, up_rows, rows in zip(*(torch.split(tensor, ROWS) for tensor in (gate, up, out)), strict=True):
        torch.mul(functional.silu(gate_rows), up_rows, out=rows)
    return out


def gated_grads(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `gate` and of `up`; the former takes the memory of `grad`, that of the product."""
    grad_up = torch.empty_like(up)
    parts = zip(*(torch.split(tensor, ROWS) for tensor in (grad, gate, up, grad_up)), strict=True)
    for grad_rows, gate_rows, up_rows, out in parts:
        torch.mul(functional.silu(gate_rows), grad_rows, out=out)
        grad_rows.mul_(up_rows)
        torch.ops.aten.silu_backward.grad_input(grad_rows, gate_rows, grad_input=grad_rows)
    return grad, grad_up
