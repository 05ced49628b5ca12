from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve_apps.scores import NUM_LIKELIEST, _place_of, draw, penalize, penalize_counts

V = 1000


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    one = partial(draw, logits, generator(), temperature=1)
    counts = Counter(one() for _ in range(4000))
    for token, probability in enumerate(logits.softmax(0).tolist()):
        # three standard deviations of a binomial share are below 0.024
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.024)


def test_temperature_divides_the_scores() -> None:
    one = partial(draw, torch.tensor([0.0, 2.0]), generator(), temperature=2)
    counts = Counter(one() for _ in range(4000))
    assert counts[1] / 4000 == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.024)


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.full((V,), -torch.inf)
    logits[[3, 700]] = 0.0
    one = partial(draw, logits, generator(), temperature=1)
    assert {one() for _ in range(200)} == {3, 700}
    assert {one(top_k=5, top_p=0.9) for _ in range(200)} == {3, 700}


@pytest.mark.parametrize(("share", "place"), [(0.0, 1), (0.49, 1), (0.5, 3), (0.99, 3), (1.0, 3)])
def test_a_share_of_the_whole_has_one_place(share: float, place: int) -> None:
    assert _place_of(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]), share) == place


@pytest.mark.parametrize("spread", [3.0, 0.5])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p: float, spread: float) -> None:
    # at a spread of 0.5, half the probability is more tokens than are looked at first
    logits = scores() / 3 * spread
    filtered = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None])[0]
    allowed = set(filtered.isfinite().nonzero().flatten().tolist())
    assert (len(allowed) > NUM_LIKELIEST) is ((spread, top_p) in [(0.5, 0.5), (0.5, 0.9), (0.5, 0.999), (3.0, 0.999)])
    one = partial(draw, logits, generator(), temperature=1, top_p=top_p)
    counts = Counter(one() for _ in range(2000))
    assert set(counts) <= allowed
    expected = filtered.softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        # five standard deviations of a binomial share
        assert counts[token] / 2000 == pytest.approx(probability, abs=5 * (probability / 2000) ** 0.5 + 1e-3)


def test_top_k_is_cut_before_top_p_as_in_transformers() -> None:
    k, p = 20, 0.8
    filtered = TopPLogitsWarper(p)(torch.zeros(1, 1), TopKLogitsWarper(k)(torch.zeros(1, 1), scores()[None]))[0]
    allowed = set(filtered.isfinite().nonzero().flatten().tolist())
    one = partial(draw, scores(), generator(), temperature=1, top_k=k, top_p=p)
    drawn = {one() for _ in range(500)}
    assert len(allowed) > 1
    assert drawn <= allowed


def test_min_p_keeps_what_transformers_keeps() -> None:
    allowed = set(
        MinPLogitsWarper(0.2)(torch.zeros(1, 1), scores()[None] / 2)[0].isfinite().nonzero().flatten().tolist()
    )
    one = partial(draw, scores(), generator(), temperature=2, min_p=0.2)
    assert {one() for _ in range(2000)} == allowed
    assert 1 < len(allowed) < 20


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ours = scores()
    penalize(ours, torch.tensor([3, 5, 8]), 1.3)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 5, 8, 5]]), scores()[None])[0]
    assert torch.allclose(ours, theirs)


def test_presence_counts_once_and_frequency_every_time() -> None:
    ours = torch.tensor([1.0, 1.0, -1.0, 2.0])
    penalize_counts(ours, {1: 1, 2: 3}, presence=0.5, frequency=0.25)
    # token 1: 1 - 0.5 - 1 x 0.25; token 2: -1 - 0.5 - 3 x 0.25
    assert ours.tolist() == [1.0, 0.25, -2.25, 2.0]


def test_without_generated_tokens_nothing_is_subtracted() -> None:
    ours = torch.ones(3)
    penalize_counts(ours, {}, presence=2, frequency=2)
    assert ours.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.5}])
@pytest.mark.parametrize("score", [-torch.inf, torch.nan])
def test_scores_that_leave_nothing_to_draw_give_a_token_of_the_vocabulary_at_once(
    score: float, options: dict[str, Any]
) -> None:
    # It would be embedded in the next pass, in which every request of the batch takes part.
    assert 0 <= draw(torch.full((V,), score), generator(), temperature=1, **options) < V
