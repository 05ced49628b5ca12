"""Attention within samples that lie end to end in one row, so that nothing is computed for padding.

H = heads, G = query heads per key/value head, N = tokens of all samples, T = tokens of one, D = head size.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_names = (f"kajiya_samples_{i}" for i in itertools.count())


class SampleAttention:
    """The attention function that transformers calls in every layer of `model`.

    Outside of `samples` it is transformers' sdpa. Inside, each sample is one causal product of its own: cost and memory
    grow with its own length, there is no mask, and a sample's result does not depend on its neighbours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # A plain attribute: autograd recomputes checkpointed layers in threads of its own, and StableLM does not hand
        # a pass's arguments to its attention.
        self._lengths: tuple[int, ...] = ()
        self._parents: tuple[int | None, ...] = ()
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
            self._lengths, self._parents = (), ()

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
        parts = list(
            zip(*(tensor.split_with_sizes(self._lengths, dim=2) for tensor in (query, key, value)), strict=True)
        )
        attended = []  # [1, T, H, D] each
        for own, parent in zip(parts, self._parents, strict=True):
            # The parent's queries come along, a small waste: products of as many queries as keys are the fast ones.
            whole = own if parent is None else [torch.cat(pair, dim=2) for pair in zip(parts[parent], own, strict=True)]
            output = sdpa_attention_forward(module, *whole, attention_mask=None, **kwargs)[0]
            attended.append(output[:, -own[0].shape[2] :])
        return torch.cat(attended, dim=1), None
