"""Frozen quantized layers in training give what bitsandbytes' own give, and keep no input."""

import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from cluster.models.frozen_product import FrozenQuantized, free_quantized

WIDTHS = (128, 64)


def quantized(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(*WIDTHS)
    if kind is Linear4bit:
        layer: nn.Module = Linear4bit(*WIDTHS, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = Linear8bitLt(*WIDTHS, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu").requires_grad_(requires_grad=False)  # which quantizes


def output_and_gradient(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    result = layer(leaf)
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    assert leaf.grad is not None
    return result.detach(), leaf.grad


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
def test_values_and_gradients_are_those_of_bitsandbytes(kind: type[nn.Module]) -> None:
    x = torch.randn(2, 5, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    fresh = output_and_gradient(FrozenQuantized(quantized(kind)).train(), x)  # before a first pass of its own
    layer = quantized(kind).train()
    expected = output_and_gradient(layer, x)
    after = output_and_gradient(FrozenQuantized(layer).train(), x)
    for ours in (fresh, after):
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
def test_no_input_outlives_the_forward_pass(kind: type[nn.Module]) -> None:
    layer = FrozenQuantized(quantized(kind)).train()
    leaf = torch.randn(5, WIDTHS[0], requires_grad=True)
    x = leaf * 2  # keeps nothing itself
    kept = weakref.ref(x.untyped_storage()), x.data_ptr()
    result = layer(x)
    del x
    assert kept[0]() is None
    result.sum().backward()
    assert leaf.grad is not None


def test_every_quantized_layer_is_found_and_evaluation_is_left_alone() -> None:
    model = nn.Sequential(quantized(Linear8bitLt), nn.ReLU(), nn.Linear(WIDTHS[1], 3))
    x = torch.randn(4, WIDTHS[0])
    with torch.no_grad():
        expected = model.eval()(x)
        free_quantized(model)
        assert isinstance(model[0], FrozenQuantized)
        torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
