"""What keeps less for backward gives the values and gradients that autograd gives."""

from collections.abc import Callable

import torch
from torch.nn import functional

from cluster.models.gating import gated, gated_grads
from cluster.models.lean_layers import RmsNorm
from train_jobs.head_loss import HeadLoss

EPSILON = 1e-5


def gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the value of `function`, and the gradients of its inputs under a fixed random one of the value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    value.backward(torch.randn(value.shape, generator=torch.Generator().manual_seed(9)))  # type: ignore[no-untyped-call]
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_norm_that_starts_backward_from_its_output() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(1, 150, 48), torch.randn(48)  # more rows than are taken at a time

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight

    def lean(x: torch.Tensor) -> torch.Tensor:
        return RmsNorm.apply(x, weight, EPSILON)  # type: ignore[no-untyped-call,no-any-return]

    check(gradients(lean, x), gradients(plain, x))


def test_a_gate_that_is_computed_again() -> None:
    torch.manual_seed(2)
    gate, up, grad = torch.randn(3, 150, 32)

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        value = functional.silu(gate) * up
        value.backward(grad)  # type: ignore[no-untyped-call]
        return value

    gate_leaf, up_leaf = gate.clone().requires_grad_(), up.clone().requires_grad_()
    value = plain(gate_leaf, up_leaf)
    check([gated(gate, up), *gated_grads(grad.clone(), gate, up)], [value.detach(), gate_leaf.grad, up_leaf.grad])


def test_a_head_whose_logits_are_forgotten() -> None:
    torch.manual_seed(3)
    hidden, weight, bias = torch.randn(300, 16), torch.randn(90, 16), torch.randn(90)
    targets = torch.randint(90, (300,))

    def plain(hidden: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="none")

    def lean(hidden: torch.Tensor) -> torch.Tensor:
        return HeadLoss.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call,no-any-return]

    check(gradients(lean, hidden), gradients(plain, hidden))
