"""What `generate` answers, and whether another answer may differ from it."""

import asyncio
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from serve_apps.engine import Engine, EngineLimits, Progress
from serve_apps.sampling import Sampling

CLOSE = 1e-3
"""Scores nearer to each other than this may change places with the kernel that computed them."""


@torch.no_grad()
def generate(model: PreTrainedModel, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy, to the last token."""
    prompt = torch.tensor([list(prompt_ids)])
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens,
        min_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = answer[0, len(prompt_ids) :].tolist()
    return tokens


@torch.no_grad()
def assert_same(model: PreTrainedModel, prompt_ids: Sequence[int], ours: list[int], theirs: list[int]) -> None:
    """Where `ours` leaves `theirs`, the two best scores of `model` have to be closer than `CLOSE`."""
    assert len(ours) == len(theirs)
    if ours == theirs:
        return
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    scores = model(torch.tensor([[*prompt_ids, *theirs[:place]]])).logits[0, -1].float()
    best = scores.topk(2)
    assert {ours[place], theirs[place]} == set(best.indices.tolist())
    assert best.values[0] - best.values[1] < CLOSE


def limits(*, max_num_seqs: int = 24, max_batch_tokens: int = 64, max_model_len: int = 256) -> EngineLimits:
    return EngineLimits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        kv_cache_tokens=max_num_seqs * max_model_len,
    )


async def answer(
    engine: Engine,
    prompt_ids: list[int],
    *,
    name: str,
    num_tokens: int,
    slot: int = -1,
    stop_token_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
) -> list[int]:
    """All tokens that `engine` gives."""
    arrived: asyncio.Queue[Progress] = asyncio.Queue()
    engine.submit(
        name,
        prompt_ids,
        max_tokens=num_tokens,
        stop_token_ids=list(stop_token_ids),
        sampling=sampling or Sampling(temperature=0),
        slot=slot,
        on_progress=arrived.put_nowait,
    )
    tokens: list[int] = []
    while True:
        progress = await arrived.get()
        assert progress.error is None, progress.error
        tokens += progress.token_ids
        if progress.is_finished:
            return tokens
