"""What is done to the scores of one row before a token is chosen. V = vocabulary."""

from collections.abc import Mapping

import torch


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
    if top_p < 1.0:
        scores, candidates = nucleus(scores, candidates, top_p)
    noise = torch.empty_like(scores).exponential_(generator=generator).log_().neg_()  # Gumbel(0, 1)
    best = int((scores + noise).argmax())
    return best if candidates is None else int(candidates[best])


def nucleus(scores: torch.Tensor, candidates: torch.Tensor | None, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores and tokens of the smallest set that holds `top_p` of the probability.

    A sort of a whole vocabulary costs milliseconds, and the nucleus is nearly always small: the likeliest tokens are
    taken first, and more only when they do not reach `top_p`.
    """
    probabilities = scores.softmax(-1)
    num = min(256, len(scores))
    while True:
        top, places = probabilities.topk(num)  # sorted, descending
        before = top.cumsum(-1) - top
        if num == len(scores) or float(before[-1] + top[-1]) >= top_p:
            places = places[before < top_p]
            return scores[places], places if candidates is None else candidates[places]
        num = min(num * 8, len(scores))
