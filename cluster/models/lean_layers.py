"""Norms and gated MLPs that keep less for backward, for a frozen base in float32.

What autograd keeps of a layer is several times what backward needs: a norm's input and its output, a gate, its
activation and the product. Here a norm keeps the output, which the linears behind it keep too, and an MLP gate and up.

N = tokens, h = hidden size, I = intermediate size.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from cluster.models.banked_linear import BankedLinear
from cluster.models.gating import ROWS

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, StableLmMLP)


class RmsNorm(torch.autograd.Function):
    """`y = x / rms(x) * weight` (arXiv:1910.07467) with `weight` frozen; backward starts from y.

    With n = y / weight, the gradient of x is (g weight - n mean(g y)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:  # noqa: D102
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()  # [N, 1]
        y: torch.Tensor = (x * scale).mul_(weight)
        ctx.save_for_backward(y, scale, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: D102
        y, scale, weight = ctx.saved_tensors
        shared = torch.linalg.vecdot(grad, y).div_(y.shape[-1]).unsqueeze(-1) * scale  # [N, 1]
        inverse, grad_x = weight.reciprocal(), torch.empty_like(grad)
        flat = (torch.split(tensor.reshape(-1, tensor.shape[-1]), ROWS) for tensor in (grad, y, scale, shared, grad_x))
        for grad_rows, rows, scale_rows, shared_rows, out in zip(*flat, strict=True):
            torch.mul(grad_rows, weight, out=out)
            out.mul_(scale_rows).addcmul_(rows * inverse, shared_rows, value=-1)
        return grad_x, None, None


class LeanRmsNorm(nn.Module):
    """Does what `norm` does, whose weight it takes."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of `x` [.., h]."""
        result: torch.Tensor = RmsNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return result


class LeanMlp(nn.Module):
    """Does what `mlp` does, whose linear layers it takes under their names."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output for `x` [.., h]."""
        gate, up = self.gate_proj(x), self.up_proj(x)  # [.., I] each
        result: torch.Tensor = self.down_proj.forward_gated(gate, up)
        return result


def make_lean(model: nn.Module) -> None:
    """Replace in `model`, which an `AdapterBank` has frozen, the layers that have a leaner form."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NORMS) and _is_invertible(module.weight):
            model.set_submodule(name, LeanRmsNorm(module).train(module.training))
        elif isinstance(module, MLPS) and _is_gated(module):
            model.set_submodule(name, LeanMlp(module).train(module.training))
    if getattr(model, "is_quantized", False):
        from cluster.models.frozen_product import free_quantized  # it loads bitsandbytes, a second's work

        free_quantized(model)


def _is_invertible(weight: torch.Tensor) -> bool:
    # In 16 bits, the output of a norm is too coarse to tell its input.
    return weight.dtype == torch.float32 and bool((weight.abs() > torch.finfo(weight.dtype).tiny).all())


def _is_gated(mlp: Any) -> bool:
    return isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) and isinstance(mlp.down_proj, BankedLinear)
