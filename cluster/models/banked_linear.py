"""A frozen linear layer with the LoRA weights of many adapters.

B = rows, T = tokens, K = slots, R = largest rank, N = all tokens of a training pass, S = ranks in a serving pass.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cluster.models.lazy_memory import lazy_zeros
from cluster.models.lora_linear import LoraLinear, LoraUpdate
from cluster.models.routing import Routing, Rows, Tokens


class BankedLinear(nn.Module):
    """`base_layer` plus, for each row or token, the update of the adapter that the routing names.

    Ranks above an adapter's own are zero in A and in B, and nothing looks at them in training.
    """

    def __init__(
        self, base_layer: nn.Module, routing: Routing, *, index: int, num_slots: int, max_r: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        d_in, d_out = features(base_layer)
        device = next(base_layer.parameters()).device
        self.base_layer = base_layer
        self.routing = routing
        self.index = index
        self.ranks = [0] * num_slots
        """Of each slot's adapter in this layer; products and updates go that far."""
        self.lora_A = nn.Parameter(lazy_zeros((num_slots, max_r, d_in), dtype=dtype, device=device))  # [K, R, d_in]
        # Transposed against PEFT, so that the ranks of several adapters lie side by side without a copy.
        self.lora_B = nn.Parameter(lazy_zeros((num_slots, max_r, d_out), dtype=dtype, device=device))  # [K, R, d_out]
        self._grads: tuple[torch.Tensor, torch.Tensor] | None = None
        self._packed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._packed_key: tuple[tuple[int, int], ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, T, d_out] for `x` [B, T, d_in]."""
        match self.routing.current:
            case Rows() as rows:
                return self._through_rows(x, rows)
            case Tokens(slots=(_, *_)) as tokens:
                added: torch.Tensor = self.base_layer(x)
                self._add_tokens(x.reshape(-1, x.shape[-1]), added.view(-1, added.shape[-1]), tokens)
                return added
            case _:
                result: torch.Tensor = self.base_layer(x)
                return result

    def place_grads(self) -> None:
        """Give the weights gradients that stay, to which a backward pass adds those of the adapters in it alone."""
        for parameter in (self.lora_A, self.lora_B):
            shape = tuple(parameter.shape)
            parameter.grad = lazy_zeros(shape, dtype=parameter.dtype, device=parameter.device)
        assert self.lora_A.grad is not None
        assert self.lora_B.grad is not None
        self._grads = self.lora_A.grad, self.lora_B.grad

    def forward_gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return what `forward` gives for silu(`gate`) * `up`, which is computed anew in backward where that can be."""
        rows = self.routing.current
        if isinstance(rows, Rows) and self._is_plain(gate):
            return self._through_rows(gate, rows, up)
        return self(functional.silu(gate) * up)  # type: ignore[no-any-return]

    def _through_rows(self, x: torch.Tensor, rows: Rows, up: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [N, d_in]
        flat_up = None if up is None else up.reshape(flat.shape)
        blocks = rows.blocks(x.shape, self.ranks, self._grads)
        mask = dropout_mask(flat, rows, self.index) if rows.dropout else None
        layer = self.base_layer
        if self._is_plain(x):
            # transformers' Conv1D holds its weight transposed.
            weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
            result: torch.Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]
                flat,
                flat_up,
                weight,
                layer.bias,
                self.lora_A,
                self.lora_B,
                mask,
                blocks,
            )
        else:
            result = LoraUpdate.apply(layer(flat), flat, self.lora_A, self.lora_B, mask, blocks)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], -1)

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Say whether base and adapters compute in one type, without quantization or autocast in between."""
        is_linear = type(self.base_layer) in (nn.Linear, Conv1D)
        return is_linear and x.dtype == self.lora_A.dtype == self.base_layer.weight.dtype and not _is_autocast(x)

    def add_update(self, x: torch.Tensor, result: torch.Tensor) -> None:
        """Add to `result` [T, d_out], in place, what the adapters make of `x` [T, d_in] in a serving pass.

        For layers whose base product is computed elsewhere, joined with others'.
        """
        match self.routing.current:
            case Tokens(slots=(_, *_)) as tokens:
                self._add_tokens(x, result, tokens)
            case Rows():
                raise ValueError("joined linear layers serve tokens; they do not train rows")

    def _add_tokens(self, x: torch.Tensor, result: torch.Tensor, tokens: Tokens) -> None:
        lora_a, lora_b = self.packed(tokens)  # [S, d_in], [S, d_out]
        if len(x) != tokens.num_tokens:
            raise ValueError(f"{len(x)} tokens in the pass, {tokens.num_tokens} in its routing")
        if tokens.mask is not None:
            _add(result, (x.to(lora_a.dtype) @ lora_a.T).mul_(tokens.mask), lora_b)
            return
        for segment in tokens.segments:
            hidden = x[segment.tokens].to(lora_a.dtype) @ lora_a[segment.ranks].T
            if isinstance(segment.tokens, slice):
                _add(result[segment.tokens], hidden, lora_b[segment.ranks])
            else:
                result[segment.tokens] = _plus(result[segment.tokens], hidden, lora_b[segment.ranks])

    def packed(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and scaled B of the pass's adapters without padding; the next decoding step mixes the same ones."""
        if self._packed is None or self._packed_key != tokens.versions:
            parts = list(zip(tokens.slots, tokens.ranks, tokens.scaling, strict=True))
            lora_a = torch.cat([self.lora_A.detach()[slot, :r] for slot, r, _ in parts])
            lora_b = torch.cat([self.lora_B.detach()[slot, :r] * scaling for slot, r, scaling in parts])
            self._packed, self._packed_key = (lora_a, lora_b), tokens.versions
        return self._packed


def _is_autocast(x: torch.Tensor) -> bool:
    return bool(torch.is_autocast_enabled(x.device.type))


def _add(result: torch.Tensor, hidden: torch.Tensor, lora_b: torch.Tensor) -> None:
    """Do to `result` in place what `_plus` returns."""
    if result.dtype == hidden.dtype:
        result.addmm_(hidden, lora_b)
    else:
        result.copy_(result + torch.matmul(hidden, lora_b))


def _plus(result: torch.Tensor, hidden: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """Return `result` [.., d_out] + `hidden` [N, R] or [K, N, R] times `lora_b`, in the type of `result`."""
    flat = result.reshape(*hidden.shape[:-1], result.shape[-1])
    fused = torch.addmm if hidden.dim() == 2 else torch.baddbmm
    if flat.dtype == hidden.dtype:
        return fused(flat, hidden, lora_b).view(result.shape)
    return (flat + torch.matmul(hidden, lora_b)).to(result.dtype).view(result.shape)


def features(layer: nn.Module) -> tuple[int, int]:
    """Return inputs and outputs of a linear layer; transformers' `Conv1D` calls them `nx` and `nf`.

    bitsandbytes' layers are `nn.Linear`s, whose `weight` may be packed: only the attributes tell the shape.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]


def dropout_mask(x: torch.Tensor, rows: Rows, index: int) -> torch.Tensor:
    """Return [N, d]: False with the row's probability; the routing's scaling makes up for what is lost.

    Each row draws from a generator seeded by its own key and the layer's `index`. So the mask of a sample does not
    depend on its neighbours, on padding, on the number of workers, nor on how often the layer runs (gradient
    checkpointing runs it twice).
    """
    mask = torch.empty_like(x, dtype=torch.bool)
    lengths = rows.lengths or [len(x) // len(rows.dropout)] * len(rows.dropout)
    # A comparison of 16 random bits, four to a drawn int64, keeps probabilities to 1 / 65536 and costs a quarter of
    # `torch.nn.functional.dropout` on a CPU.
    bits = torch.empty(-(-max(lengths) * x.shape[1] // 4), dtype=torch.int64, device=x.device)
    for row, p, key in zip(mask.split_with_sizes(lengths), rows.dropout, rows.dropout_keys, strict=True):
        generator = torch.Generator(x.device).manual_seed(mix(key, index))
        drawn = bits[: -(-row.numel() // 4)].random_(-(2**63), None, generator=generator)
        torch.ge(drawn.view(torch.int16)[: row.numel()], round(p * 65536) - 32768, out=row.view(-1))
    return mask


def mix(*parts: int) -> int:
    """Return 32 well-mixed bits of `parts` (the finalizer of SplitMix64, Steele et al. 2014), to seed a generator.

    torch's CPU generator looks at 32 bits of its seed; seeds that differ by one would give related streams.
    """
    state = 0
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0xFFFFFFFF
