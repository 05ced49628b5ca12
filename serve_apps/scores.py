"""What is done to the scores of one row before a token is chosen. V = vocabulary."""

import math
from collections.abc import Mapping

import torch

NUM_LIKELIEST = 256
"""Tokens among which a nucleus is looked for first."""


def penalize(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> None:
    """Make the tokens `seen` less likely in `scores` [V], in place (arXiv:1909.05858)."""
    chosen = scores[seen]
    scores[seen] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)


def penalize_counts(scores: torch.Tensor, counts: Mapping[int, int], *, presence: float, frequency: float) -> None:
    """Subtract from `scores` [V], in place, `presence` once and `frequency` for every time a token was generated.

    OpenAI's formula: score[j] - count[j] x frequency_penalty - (count[j] > 0) x presence_penalty.
    """
    if not counts:
        return
    token_ids = torch.tensor(list(counts), device=scores.device)
    times = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
    scores[token_ids] -= presence + frequency * times


def draw(
    scores: torch.Tensor,
    generator: torch.Generator,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """Return a token drawn from softmax(`scores` [V] / temperature), cut by min_p, then to top_k, then to top_p.

    The order is vLLM's. min_p drops what is less likely than that share of the likeliest token (arXiv:2407.01082);
    top_p keeps the most likely tokens up to the one that reaches it (arXiv:1904.09751).
    """
    scores = scores.to("cpu", torch.float32) / temperature
    candidates: torch.Tensor | None = None
    if min_p > 0:
        least = scores.max() + torch.tensor(min_p).log()  # p_i >= min_p x p_max, without the softmax
        scores = scores.masked_fill(scores < least, -torch.inf)
    if 0 < top_k < len(scores):
        scores, candidates = scores.topk(top_k)
    probabilities = scores.softmax(-1)
    if math.isnan(float(probabilities[0])):
        # All of them are, if one score was, or every one is -inf. There is nothing to draw from, and a place beyond the
        # vocabulary would end the batch for everybody.
        return int(scores.argmax()) if candidates is None else int(candidates[0])
    place = _draw_nucleus(probabilities, top_p, generator)
    return place if candidates is None else int(candidates[place])


def _draw_nucleus(probabilities: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    """Return a place drawn from the likeliest of `probabilities`, up to the one with which they reach `top_p`.

    A sort of a whole vocabulary costs milliseconds. The nucleus is nearly always small, so it is looked for among the
    likeliest tokens first. If it is larger, draws from the whole are repeated until one lies in it: seldom more than
    1 / top_p.
    """
    if top_p >= 1.0:
        return _place_of(probabilities, _share(generator))
    top, places = probabilities.topk(min(NUM_LIKELIEST, len(probabilities)))  # sorted, descending
    before = top.cumsum(-1) - top
    if len(top) == len(probabilities) or float(before[-1] + top[-1]) >= top_p:
        return int(places[_place_of(top * (before < top_p), _share(generator))])
    while True:
        place = _place_of(probabilities, _share(generator))
        if float((probabilities * (probabilities > probabilities[place])).sum()) < top_p:
            return place


def _share(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _place_of(probabilities: torch.Tensor, share: float) -> int:
    """Return where the running sum of `probabilities` passes `share` of the whole, never where one of them is 0.

    Inverse transform sampling. It takes one random number; the Gumbel-max trick takes one for each of V tokens, which
    costs ten times as much as all else here.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    total = float(sums[-1])
    level = min(share * total, math.nextafter(total, 0.0))  # the product may round up to the whole
    return int(torch.searchsorted(sums, level, right=True))
