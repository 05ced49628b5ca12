"""Linear layers whose weights lie in the order in which the CPU reads them.

A decoding step multiplies a few rows by every weight of the model once, so it is bound by reading weights. oneDNN's
blocked layout is read faster than rows: 53 ms instead of 74 for the linears of SmolLM2-135M, 16 rows, one core with
AVX-512; 42 instead of 69 with 8 rows, 33 instead of 29 with one, the same with hundreds.

N = rows of the input.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from cluster.models.banked_linear import BankedLinear, features
from cluster.models.routing import Tokens
from serve_apps.kernels import Updates, kernels

ROWS = 16
"""Rows the layout is chosen for; any number of rows works with it."""


class JoinedLinears(nn.Module):
    """Linear layers of one input as one product, in float32 for inference; it cannot be trained or saved."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._starts = list(accumulate((linear.out_features for linear in linears), initial=0))
        self._bias = _join_biases(linears)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self._kernels = kernels()
        self._updates: Updates | None = None
        # The overloads themselves: finding them anew would take microseconds, in every layer of every pass.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add = torch.ops.mkldnn._linear_pointwise.binary

    def forward(
        self,
        x: torch.Tensor,  # [N, in]
        parts: Sequence[nn.Module] = (),
        *,
        residual: torch.Tensor | None = None,  # [N, out]
    ) -> torch.Tensor:
        """Return `x` times the weights, plus biases, `residual` and the updates of those `parts` with adapters."""
        output: torch.Tensor
        if residual is None:
            output = self._multiply(x, self._packed, self._bias, "none", [], "")
        else:
            output = self._multiply_add(x, residual, self._packed, self._bias, "add")
        adapted = {
            start: part
            for part, start in zip(parts, self._starts, strict=False)
            if isinstance(part, BankedLinear) and part.routing.current is not None
        }
        if adapted:
            self._add_updates(adapted, x, output)
        return output

    def _add_updates(self, adapted: dict[int, BankedLinear], x: torch.Tensor, output: torch.Tensor) -> None:
        first = next(iter(adapted.values()))
        tokens = first.routing.current
        if self._kernels is None or not isinstance(tokens, Tokens) or first.lora_A.dtype != torch.float32:
            for start, part in adapted.items():
                part.add_update(x, output[:, start : start + features(part.base_layer)[1]])
        elif len(x) != tokens.num_tokens:
            raise ValueError(f"{len(x)} tokens in the pass, {tokens.num_tokens} in its routing")
        elif tokens.slots:
            if self._updates is None:  # from the first pass with adapters on, a layer has them for good
                self._updates = Updates({start: (part.lora_A, part.lora_B) for start, part in adapted.items()})
            self._kernels.add_updates(
                x, self._updates, tokens.slot_of_token, tokens.rank_of_token, tokens.scales, output
            )


class LinearPart(nn.Linear):
    """What stays in a linear layer's place when its weights have moved: its name and shape, for adapters to find."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        # Modules around it ask a layer for its weight's type and device, never for its values.
        self.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002, ARG002 (the name in nn.Linear)
        """Raise: the layer around it holds the weights."""
        raise RuntimeError("this layer's weights were joined with its neighbours'")


class PackedLinear(LinearPart):
    """An `nn.Linear` in float32 for inference, taken over from `linear`; it cannot be trained or saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._joined = JoinedLinears([linear])

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (the name in nn.Linear)
        """Return `input` [.., in] times the weights, plus the bias: [.., out]."""
        output: torch.Tensor = self._joined(input)
        return output


def pack_linears(model: nn.Module) -> int:
    """Replace every float32 `nn.Linear` on the CPU in `model` and return how many; quantized layers stay."""
    found = [(name, module) for name, module in model.named_modules() if is_packable(module)]
    for name, module in found:
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, PackedLinear(module))
    return len(found)


def is_packable(module: nn.Module) -> bool:
    """Return whether `module` is a float32 linear layer on a CPU that has oneDNN."""
    # Exactly nn.Linear: bitsandbytes' layers derive from it and hold other weights.
    if type(module) is not nn.Linear or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"


def _join_biases(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    biases = (
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
    )
    return torch.cat([bias.detach() for bias in biases])
