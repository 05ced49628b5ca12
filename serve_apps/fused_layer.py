"""Decoder layers of Llama's kind in fewer and larger operations, for a CPU.

With a few rows, most of a layer's operations cost their start. Query, key and value are one product here, gate and up
another; sums are added where a product is written; queries and keys turn together.

B = sequences (1 in a continuous batch), T = tokens of each, N = B x T, H and K = query and key/value heads, D = head
size, I = intermediate size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from serve_apps.kernels import kernels
from serve_apps.packed_linear import JoinedLinears, LinearPart, is_packable


class FusedLayer(nn.Module):
    """Does what `layer` does, whose weights it takes; linear layers keep their names, so adapters find them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.config: PreTrainedConfig = layer.self_attn.config
        self._qkv = _join(self.self_attn, "q_proj", "k_proj", "v_proj")
        self._o = _join(self.self_attn, "o_proj")
        self._gate_up = _join(self.mlp, "gate_proj", "up_proj")
        self._down = _join(self.mlp, "down_proj")
        self._kernels = kernels() if type(layer.mlp.act_fn) in (nn.SiLU, SiLUActivation) else None

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, T, hidden]
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,  # of a `SignedRotary`
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the hidden states after this layer."""
        shape, attention, mlp = hidden_states.shape, self.self_attn, self.mlp
        states: torch.Tensor = hidden_states.reshape(-1, shape[-1])  # [N, hidden]
        normed = self._norm(self.input_layernorm, states)
        qkv = self._qkv.forward(normed, (attention.q_proj, attention.k_proj, attention.v_proj))
        query, key, value = self._heads(qkv.view(*shape[:-1], -1, attention.head_dim), position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attend: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
        states = self._o.forward(attended.reshape(len(states), -1), (attention.o_proj,), residual=states)
        normed = self._norm(self.post_attention_layernorm, states)
        gate_up = self._gate_up.forward(normed, (mlp.gate_proj, mlp.up_proj))  # [N, 2 I]
        states = self._down.forward(self._activate(gate_up), (mlp.down_proj,), residual=states)
        return states.view(shape)

    def _heads(
        self,
        heads: torch.Tensor,  # [B, T, H + 2 K, D]
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [B, H, T, D], turned by their positions, keys [B, K, T, D], likewise, and values."""
        assert position_embeddings is not None
        cos, sin = position_embeddings
        num_kv: int = self.config.num_key_value_heads
        turning, value = heads[:, :, :-num_kv], heads[:, :, -num_kv:]
        if self._kernels is not None:
            self._kernels.turn(heads.flatten(0, 1), cos, sin, num_turned=turning.shape[2])
            turned = turning.transpose(1, 2)
            return turned[:, :-num_kv], turned[:, -num_kv:], value.transpose(1, 2)
        swapped = turning.view(*turning.shape[:-1], 2, -1).flip(-2).flatten(-2)
        turned = torch.addcmul(turning * cos, swapped, sin).transpose(1, 2)
        return turned[:, :-num_kv], turned[:, -num_kv:], value.transpose(1, 2)

    def _norm(self, norm: Any, states: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.rms_norm(states, norm.weight, norm.variance_epsilon)
        result: torch.Tensor = torch.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)
        return result

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.silu_and_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = self.mlp.act_fn(gate).mul_(up)
        return activated


class SignedRotary(nn.Module):
    """Gives what `rotary` gives, in the shape that `FusedLayer` turns heads with."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [B, T, 1, D]; the first half of the sines is negative (arXiv:2104.09864, 34).

        The halves (a, b) of a head become (a cos - b sin, b cos + a sin).
        """
        cos, sin = (part.expand(len(x), -1, -1) for part in self.rotary(x, position_ids=position_ids))  # [B, T, D] each
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos.contiguous().unsqueeze(2), signed.unsqueeze(2)


def fuse_layers(model: PreTrainedModel) -> int:
    """Replace the decoder layers of `model`, if they are of Llama's kind in float32 on a CPU, and return how many."""
    base = model.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(map(_is_fusable, layers)):
        return 0
    for index, layer in enumerate(layers):
        layers[index] = FusedLayer(layer)
    base.rotary_emb = SignedRotary(base.rotary_emb)
    return len(layers)


def _is_fusable(layer: nn.Module) -> bool:
    is_known = type(layer) in (LlamaDecoderLayer, Qwen2DecoderLayer)
    is_sliding = getattr(getattr(layer, "self_attn", None), "sliding_window", None) is not None
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return is_known and not is_sliding and all(map(is_packable, linears))


def _join(owner: nn.Module, *names: str) -> JoinedLinears:
    linears = [getattr(owner, name) for name in names]
    joined = JoinedLinears(linears)
    for name, linear in zip(names, linears, strict=True):
        setattr(owner, name, LinearPart(linear))
    return joined
