"""Attention of a continuous batch, request by request, for devices without flash attention.

transformers' own sdpa path lays all requests end to end and masks what is not theirs: its cost grows with the square
of the batch, and so does its mask. Here decoding requests of similar length share one padded product, and each
prompt gets its own.

B = requests, H = heads, G = query heads per key/value head, T = query tokens, S = cached tokens, D = head size.
"""

import itertools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type

from serve_apps.kernels import kernels

DROPS_ARGUMENTS = frozenset({"stablelm"})
"""Model types whose layers do not hand a pass's arguments to the attention (transformers 5.19): with transformers' own
functions each token would see only its pass, without an error."""
_names = (f"kajiya_paged_{i}" for i in itertools.count())


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """Requests with one new token each, padded to the longest among them."""

    rows: torch.Tensor  # [B]: their places among the query tokens
    num_cached: int
    """S, of the longest."""
    keys: slice
    """Their B x S places among the keys read."""
    mask: torch.Tensor | None  # [B, 1, 1, S], added to the scores; None where all are equally long


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One request with several new tokens."""

    rows: slice
    keys: slice
    mask: torch.Tensor | None  # [1, 1, T, S], added to the scores; None where plain causal attention does


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one forward pass is cut into products; the same for all its layers."""

    parts: tuple[Decoding | Prompt, ...]
    read_index: torch.Tensor
    """Where in the cache the keys of all parts lie, in their order; empty when nothing was cached before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the cached tokens of a pass lie in which every request has one new token, for `Kernels.attend`."""

    places: torch.Tensor  # [B, S], int64
    lengths: torch.Tensor  # [B], int64
    scores: torch.Tensor  # [B, H, S], to work in


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward pass, as all layers see it."""

    cache: PagedAttentionCache
    write_index: torch.Tensor  # [T]: where in the cache the keys and values of the pass go
    layout: Layout | Places


class PerRequestAttention:
    """The attention function that transformers calls in every layer of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._pass: Pass | None = None
        self._kernels = kernels() if model.dtype == torch.float32 and model.device.type == "cpu" else None
        self._num_heads: int = model.config.get_text_config().num_attention_heads
        name = next(_names)
        AttentionInterface.register(name, self)
        model.set_attn_implementation(name)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002 (torch's)
        if "cache" not in kwargs:
            self._pass = None
            return
        (read_index,) = kwargs["read_index"]
        (bounds_k,) = kwargs["cu_seq_lens_k"].values()
        (write_index,) = kwargs["write_index"]
        layout: Layout | Places
        if self._kernels is not None and len(read_index) and kwargs["max_length_q"] == 1:
            layout = find_places(bounds_k, read_index, num_heads=self._num_heads)
        else:
            dtype = kwargs["cache"].dtype
            layout = lay_out(kwargs["cu_seq_lens_q"].tolist(), bounds_k.tolist(), read_index, dtype)
        self._pass = Pass(cache=kwargs["cache"], write_index=write_index, layout=layout)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, H / G, T, D]
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,  # noqa: ARG002 (the interface's; the layout replaces it)
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the attention output [1, T, H, D]; keys and values of the pass are written into the cache."""
        now = self._pass
        if now is None:
            raise RuntimeError("this attention runs inside continuous batching only")
        # What `PagedAttentionCache.update` does, without its bookkeeping in every layer.
        allocator = now.cache.layer_to_allocator[module.layer_idx]
        new = [x[0].transpose(0, 1) for x in (key, value)]  # [T, H / G, D] each
        if isinstance(now.layout, Places):
            return self._attend(
                query[0].transpose(0, 1), new, allocator._kv_token_views[module.layer_idx], scaling
            ), None
        index = now.layout.read_index
        keys, values = allocator.update(*new, module.layer_idx, index, now.write_index)  # [S, H / G, D]
        if len(now.layout.parts) == 1 and isinstance(now.layout.parts[0], Decoding):
            return _decode(now.layout.parts[0], query[0].transpose(0, 1), keys, values, scaling)[None], None
        output = torch.empty_like(query.transpose(1, 2))
        for part in now.layout.parts:
            if isinstance(part, Decoding):
                output[0, part.rows] = _decode(part, query[0][:, part.rows].transpose(0, 1), keys, values, scaling)
            else:
                output[:, part.rows] = _prefill(part, query[:, :, part.rows], keys, values, scaling)
        return output, None

    def _attend(
        self,
        query: torch.Tensor,  # [B, H, D]
        new: list[torch.Tensor],  # [B, H / G, D]: keys, and values
        cached: tuple[torch.Tensor, torch.Tensor],  # [.., H / G, D] each
        scaling: float | None,
    ) -> torch.Tensor:
        now = self._pass
        assert now is not None
        assert isinstance(now.layout, Places)
        assert self._kernels is not None
        for cache, tokens in zip(cached, new, strict=True):
            cache.index_copy_(0, now.write_index, tokens)
        where = now.layout
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = query if query.stride()[1:] == (query.shape[-1], 1) else query.contiguous()
        return self._kernels.attend(query, *cached, where.places, where.lengths, where.scores, scale)[None]


def supports(config: PreTrainedConfig) -> bool:
    """Return whether every layer is plain full attention, without sinks, soft caps or position biases."""
    is_full = set(group_layers_by_attn_type(config)) == {"full_attention"}
    extras = ("attn_logit_softcapping", "position_bias", "alibi", "attention_sink")
    return is_full and not any(getattr(config, extra, None) for extra in extras)


def find_places(bounds_k: torch.Tensor, read_index: torch.Tensor, *, num_heads: int) -> Places:
    """Return the places of requests with one new token each, whose keys are within `bounds_k[i]` and `[i + 1]`."""
    first, last = bounds_k[:-1].long()[:, None], bounds_k[1:].long()[:, None]  # [B, 1]
    lengths = (last - first).flatten()
    longest = int(lengths.max())
    places = read_index[torch.minimum(first + torch.arange(longest), last - 1)]  # [B, S]; what is beyond is not read
    return Places(places=places, lengths=lengths, scores=torch.empty(len(lengths), num_heads, longest))


def lay_out(bounds_q: list[int], bounds_k: list[int], read_index: torch.Tensor, dtype: torch.dtype) -> Layout:
    """Return the parts of a pass with the query tokens and keys of request i within `bounds[i]` and `bounds[i + 1]`.

    Decoding requests share a part when their lengths have the same power of two: padding at most doubles the work.
    """
    requests = [
        (q, q_end, k, k_end) for (q, q_end), (k, k_end) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)
    ]
    if not len(read_index):  # nothing cached: keys and values are those of this pass, in its order
        whole = (Prompt(rows=slice(q, q_end), keys=slice(k, k_end), mask=None) for q, q_end, k, k_end in requests)
        return Layout(parts=tuple(whole), read_index=read_index)
    groups: dict[int, list[tuple[int, int, int]]] = {}
    prompts = []
    for q, q_end, k, k_end in requests:
        if q_end - q == 1:
            groups.setdefault((k_end - k - 1).bit_length(), []).append((q, k, k_end))
        else:
            prompts.append((q, q_end, k, k_end))
    parts: list[Decoding | Prompt] = []
    indices: list[torch.Tensor] = []
    start = 0
    for group in groups.values():
        part, index = _group(group, start, read_index, dtype)
        parts.append(part)
        indices.append(index)
        start = part.keys.stop
    for q, q_end, k, k_end in prompts:
        mask = _causal_mask(q_end - q, k_end - k, read_index.device, dtype)
        parts.append(Prompt(rows=slice(q, q_end), keys=slice(start, start + k_end - k), mask=mask))
        indices.append(read_index[k:k_end])
        start += k_end - k
    return Layout(parts=tuple(parts), read_index=torch.cat(indices))


def _group(
    group: list[tuple[int, int, int]], start: int, read_index: torch.Tensor, dtype: torch.dtype
) -> tuple[Decoding, torch.Tensor]:
    device = read_index.device
    rows, first, last = torch.tensor(group, device=device).T  # [B] each
    num_cached = max(end - begin for _, begin, end in group)
    places = first[:, None] + torch.arange(num_cached, device=device)  # [B, S]
    beyond = places >= last[:, None]
    index = read_index[torch.minimum(places, last[:, None] - 1)].flatten()  # padding repeats a request's last key
    mask = None
    if any(end - begin != num_cached for _, begin, end in group):
        mask = torch.zeros(places.shape, dtype=dtype, device=device).masked_fill_(beyond, float("-inf"))[:, None, None]
    return Decoding(rows=rows, num_cached=num_cached, keys=slice(start, start + len(index)), mask=mask), index


def _causal_mask(num_new: int, num_cached: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    if num_new == num_cached:
        return None
    seen = torch.ones(num_new, num_cached, dtype=torch.bool, device=device).tril(num_cached - num_new)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[None, None]


def _decode(
    part: Decoding,
    query: torch.Tensor,  # [B, H, D]
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Return the attention output [B, H, D]."""
    num, num_kv, size = len(part.rows), keys.shape[1], query.shape[-1]
    # A decoding token sees all of its request, so the G heads of a key/value head are G rows of one product.
    grouped = query.reshape(num, num_kv, -1, size)  # [B, H / G, G, D]
    shape = (num, part.num_cached, num_kv, size)
    key, value = (x[part.keys].view(shape).transpose(1, 2) for x in (keys, values))
    mask = None if part.mask is None else part.mask.expand(-1, -1, grouped.shape[2], -1)
    result = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return result.reshape(num, -1, size)


def _prefill(
    part: Prompt,
    query: torch.Tensor,  # [1, H, T, D]
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Return the attention output [1, T, H, D]."""
    key, value = (x[part.keys].transpose(0, 1)[None] for x in (keys, values))  # [1, H / G, S, D] each
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=part.mask,
        is_causal=part.mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)
