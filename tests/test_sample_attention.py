"""Samples that go on from an opening they share, against attention written out."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama_folder
from torch import nn
from transformers import AutoModelForCausalLM

from cluster.models.sample_attention import MASKED_KEYS, SampleAttention


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what the last queries [H, T, D] of a causal product attend to."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) / query.shape[2] ** 0.5
    num_queries, num_keys = scores.shape[1:]
    later = torch.arange(num_keys) > torch.arange(num_keys - num_queries, num_keys)[:, None]
    attended: torch.Tensor = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    return attended


@pytest.mark.parametrize(
    "lengths", [(5, 1, 9), (5, 7, 7, 7, 2), (20, MASKED_KEYS - 20, MASKED_KEYS - 19, MASKED_KEYS - 19)]
)
def test_samples_see_their_opening_and_not_each_other(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    attention = SampleAttention(AutoModelForCausalLM.from_pretrained(tiny_llama_folder(tmp_path)))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 16, requires_grad=True) for heads in (6, 2, 2))
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    with attention.samples(lengths, (None, *[0] * (len(lengths) - 1))):
        found, _ = attention(module, query, key, value, None, scaling=16**-0.5)
    opening, *own = (range(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths)))
    parts = [(opening, opening), *((tokens, [*opening, *tokens]) for tokens in own)]
    expected = torch.cat(
        [written_out(query[0][:, list(q)], key[0][:, list(k)], value[0][:, list(k)]) for q, k in parts], dim=1
    )
    torch.testing.assert_close(found[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    inputs = (query, key, value)
    ours = torch.autograd.grad((found[0].transpose(0, 1) * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
