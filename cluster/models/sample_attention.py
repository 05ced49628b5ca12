"""Attention within samples that lie end to end in one row, so that nothing is computed for padding.

H = heads, G = query heads per key/value head, N = tokens of all samples, T = tokens of one, S = neighbours of one
length, D = head size.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MASKED_KEYS = 512
"""Up to so many, a sample that goes on from another leaves that one's queries out, by a mask."""
_names = (f"kajiya_samples_{i}" for i in itertools.count())


@dataclass(frozen=True, slots=True)
class _Run:
    """Samples of one length that lie side by side, and go on from the same other one."""

    length: int
    parent: int | None
    count: int


class SampleAttention:
    """The attention function that transformers calls in every layer of `model`.

    Outside of `samples` it is transformers' sdpa. Inside, each sample attends to itself alone, without padding: cost
    and memory grow with its own length, and its result does not depend on its neighbours. Those of one length that lie
    side by side are one product, since each product has its price.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # A plain attribute: autograd recomputes checkpointed layers in threads of its own, and StableLM does not hand
        # a pass's arguments to its attention.
        self._runs: tuple[_Run, ...] = ()
        self._places: tuple[tuple[int, int], ...] = ()
        """Of each sample: the number of its run, and its place there."""
        name = next(_names)
        AttentionInterface.register(name, self)
        AttentionMaskInterface.register(name, self._mask)
        model.set_attn_implementation(name)

    @contextmanager
    def samples(self, lengths: Sequence[int], parents: Sequence[int | None] = ()) -> Iterator[None]:
        """Take the passes inside, `[1, N]` each, and their backward passes as samples of `lengths`.

        One with a number in `parents` goes on from the sample of that number, which several may do.
        """
        known = itertools.groupby(zip(lengths, parents or [None] * len(lengths), strict=True))
        self._runs = tuple(_Run(*key, count=len(list(run))) for key, run in known)
        self._places = tuple((number, place) for number, run in enumerate(self._runs) for place in range(run.count))
        try:
            yield
        finally:
            self._runs, self._places = (), ()

    def _mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Return no mask where `samples` are told, unless one is longer than the model's sliding window."""
        if self._runs and (local_size is None or max(run.length for run in self._runs) <= local_size):
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
        if not self._runs or attention_mask is not None:
            output: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
            return output, None
        of_runs = list(zip(*map(self._split, (query, key, value)), strict=True))
        attended = []  # [1, S T, H, D] each
        for run, own in zip(self._runs, of_runs, strict=True):
            if run.parent is None:
                output = sdpa_attention_forward(module, *own, attention_mask=None, **kwargs)[0]
            else:
                number, place = self._places[run.parent]
                shared = [part[place : place + 1].expand(run.count, -1, -1, -1) for part in of_runs[number]]
                output = _going_on(module, shared, own, **kwargs)
            attended.append(output.reshape(1, -1, *output.shape[2:]))
        return torch.cat(attended, dim=1), None

    def _split(self, heads: torch.Tensor) -> list[torch.Tensor]:
        """Return what each run has of `heads` [1, H, N, D], as [S, H, T, D]."""
        parts = heads.squeeze(0).split_with_sizes([run.count * run.length for run in self._runs], dim=1)
        shapes = [(run.count, run.length) for run in self._runs]
        return [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, shapes, strict=True)]  # type: ignore[no-untyped-call]


def _going_on(
    module: nn.Module, parent: Sequence[torch.Tensor], own: Sequence[torch.Tensor], **kwargs: Any
) -> torch.Tensor:
    """Return the attention [S, T, H, D] of samples' `own` queries to their own keys and those of their `parent`."""
    query, key, value = own
    key, value = (torch.cat(pair, dim=2) for pair in zip(parent[1:], (key, value), strict=True))
    num_queries, num_keys = query.shape[2], key.shape[2]
    if query.device.type == "cpu" and num_keys <= MASKED_KEYS:
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
    # The parent's queries come along: in long samples a small waste, and on GPUs products without a mask are faster.
    whole = torch.cat((parent[0], query), dim=2)
    attended: torch.Tensor = sdpa_attention_forward(module, whole, key, value, attention_mask=None, **kwargs)[0]
    return attended[:, -num_queries:]


@functools.cache
def _later_keys(dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores [query, key]: minus infinity for keys behind the query."""
    return torch.full((MASKED_KEYS, MASKED_KEYS), -torch.inf, dtype=dtype).triu_(1)
