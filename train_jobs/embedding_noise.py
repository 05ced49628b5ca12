"""NEFTune (arXiv:2310.05914): noise on the embeddings of training samples, against learning by heart.

N = tokens of all samples, T = tokens of one, d = hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cluster.models.banked_linear import mix

STREAM = 0x4E4546
"""Tells the noise of a sample from its dropout, whose streams are numbered by layer."""


class EmbeddingNoise:
    """Adds to the output of `model`'s input embeddings, inside of `samples`.

    Each sample's noise is uniform in ±alpha / sqrt(T d) and follows from its key alone: it is the same in a pack,
    alone, and on any worker. transformers' own hook would take the samples of a row for one, and draw all runs' noise
    from one stream.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._samples: tuple[tuple[int, float, int], ...] = ()
        model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def samples(self, lengths: Sequence[int], alphas: Sequence[float], keys: Sequence[int]) -> Iterator[None]:
        """Take the passes inside, `[1, N]` each, as samples of `lengths`, each with its noise; 0.0 is none."""
        self._samples = tuple(zip(lengths, alphas, keys, strict=True)) if any(alphas) else ()
        try:
            yield
        finally:
            self._samples = ()

    def _add(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if not self._samples:
            return output
        noise = [_noise(length, output.shape[-1], alpha, key) for length, alpha, key in self._samples]
        return output + torch.cat(noise)[None].to(output)  # [1, N, d]


def _noise(length: int, hidden_size: int, alpha: float, key: int) -> torch.Tensor:
    """Return the noise [T, d] of a sample, drawn on the CPU, whose generator is the same everywhere."""
    noise = torch.empty(length, hidden_size)
    generator = torch.Generator().manual_seed(mix(key, STREAM))
    return noise.uniform_(-1, 1, generator=generator).mul_(alpha / (length * hidden_size) ** 0.5)
