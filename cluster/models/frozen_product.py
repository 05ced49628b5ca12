"""The product with a frozen quantized layer in training.

bitsandbytes' 8-bit product keeps its input, which no frozen weight needs, where gradient checkpointing cannot drop it.
On a CPU both of its products multiply by MKL, here by the faster library (`cluster.models.products`).

N = tokens, d = inputs, o = outputs.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.autograd.function import once_differentiable

from cluster.models.products import linear, times

INT8_MAX = 127.0


class FrozenProduct(torch.autograd.Function):
    """`x W^T + bias`; what is kept is the layer, which is there anyway, and backward makes W from it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:  # noqa: D102 -- x [N, d]
        ctx.layer = layer
        if _is_exact(x):
            return linear(x, _weight(layer, x.dtype), layer.bias)  # type: ignore[arg-type] # [N, o]
        result: torch.Tensor = layer(x)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:  # noqa: D102
        return times(grad, _weight(ctx.layer, grad.dtype)) if ctx.needs_input_grad[0] else None, None


class FrozenQuantized(nn.Module):
    """Does what the 4-bit or 8-bit `layer` does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [.., o] for `x` [.., d]."""
        # 4-bit layers keep nothing of their own accord, and have kernels on a GPU.
        is_better = _is_exact(x) or isinstance(self.layer, Linear8bitLt)
        if not (self.training and is_better):
            return self.layer(x)  # type: ignore[no-any-return]
        flat: torch.Tensor = FrozenProduct.apply(x.reshape(-1, x.shape[-1]), self.layer)  # type: ignore[no-untyped-call]
        return flat.view(*x.shape[:-1], -1)


def free_quantized(model: nn.Module) -> None:
    """Let each of bitsandbytes' linear layers in `model` be a `FrozenQuantized`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            model.set_submodule(name, FrozenQuantized(module).train(module.training))


def _is_exact(x: torch.Tensor) -> bool:
    """Say whether bitsandbytes, too, would multiply by the weight in float32."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def _weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [o, d] of `layer`, as bitsandbytes' backward passes make it."""
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype)  # type: ignore[no-any-return]
    # bitsandbytes moves both from the weight into its state at the layer's first pass of its own.
    is_moved = layer.weight.CB is None
    values, scales = (layer.state.CB, layer.state.SCB) if is_moved else (layer.weight.CB, layer.weight.SCB)
    return values.to(dtype).mul_(scales.unsqueeze(1) / INT8_MAX)  # type: ignore[no-any-return]
