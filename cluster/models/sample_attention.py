"""Attention within samples that lie end to end in one row, so that nothing is computed for padding.

H = heads, G = query heads per key/value head, N = tokens of all samples, D = head size, S = samples of a product,
T = queries of each of them, L = keys.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cluster.models.sample_groups import Groups, group_samples

MASKED_KEYS = 512
"""Up to so many, a sample that goes on from another leaves that one's queries out, by a mask."""
_names = (f"kajiya_samples_{i}" for i in itertools.count())


class SampleAttention:
    """The attention function that transformers calls in every layer of `model`.

    Outside of `samples` it is transformers' sdpa. Inside, each sample attends to itself alone, in one causal product
    with those of nearly its length: cost and memory grow with its own length, and its result does not depend on its
    neighbours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Plain attributes: autograd recomputes checkpointed layers in threads of its own, and StableLM does not hand
        # a pass's arguments to its attention.
        self._lengths: tuple[int, ...] = ()
        self._parents: tuple[int | None, ...] = ()
        self._groups: Groups | None = None
        name = next(_names)
        AttentionInterface.register(name, self)
        AttentionMaskInterface.register(name, self._mask)
        model.set_attn_implementation(name)

    @contextmanager
    def samples(self, lengths: Sequence[int], parents: Sequence[int | None] = ()) -> Iterator[None]:
        """Take the passes inside, `[1, N]` each, and their backward passes as samples of `lengths`.

        One with a number in `parents` goes on from the sample of that number, which several may do.
        """
        self._lengths, self._parents = tuple(lengths), tuple(parents) or (None,) * len(lengths)
        try:
            yield
        finally:
            self._lengths, self._parents, self._groups = (), (), None

    def _mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Return no mask where `samples` are told, unless one is longer than the model's sliding window."""
        if self._lengths and (local_size is None or max(self._lengths) <= local_size):
            return None
        # transformers sees from the positions where samples begin.
        mask: torch.Tensor | None = sdpa_mask(*args, local_size=local_size, **kwargs)
        return mask

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [1, H, N, D]
        key: torch.Tensor,  # [1, H / G, N, D]
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the attention output [1, N, H, D]."""
        if not self._lengths or attention_mask is not None:
            output: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
            return output, None
        if self._groups is None:
            masked_keys = MASKED_KEYS if query.device.type == "cpu" else 0
            self._groups = group_samples(self._lengths, self._parents, masked_keys=masked_keys, device=query.device)
        groups = self._groups
        queries = groups.split_queries(_rows(query, groups.queries))
        keys, values = (groups.split_keys(_rows(part, groups.keys)) for part in (key, value))
        attended = [
            _attend(module, *parts, **kwargs).flatten(0, 1) for parts in zip(queries, keys, values, strict=True)
        ]
        joined = torch.cat(attended)  # [padded queries, H, D]
        return embedding(groups.tokens, joined.flatten(1)).view(1, -1, *joined.shape[1:]), None


def _rows(heads: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the `chosen` tokens of `heads` [1, H, N, D], some of them more than once, [chosen, H, D]."""
    # `embedding` adds up the gradients of a row in one pass over memory, an index row by row.
    rows = heads[0].transpose(0, 1)
    return embedding(chosen, rows.flatten(1)).view(-1, *rows.shape[1:])


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Return the attention [S, T, H, D] of the last T of L tokens to all before them, from [S, T or L, heads, D]."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys:
        attended: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask=None, **kwargs)[0]
        return attended
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_later_keys(query.dtype)[num_keys - num_queries : num_keys, :num_keys],
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=query.shape[1] > key.shape[1],
    )
    return output.transpose(1, 2)


@functools.cache
def _later_keys(dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores [query, key]: minus infinity for keys behind the query."""
    return torch.full((MASKED_KEYS, MASKED_KEYS), -torch.inf, dtype=dtype).triu_(1)
