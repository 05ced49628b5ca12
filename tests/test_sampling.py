import copy
from collections import Counter

import pytest
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from serve_apps.sampling import ROUTE, BatchSampler, Route, Sampling, draw, nucleus, penalize

V = 1000


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def in_batch(slot: int, sampling: Sampling, *, num_tokens: int = 1, has_new_token: bool = True) -> FutureRequestState:
    route = Route(slot=slot, sampling=sampling)
    state = RequestState(request_id=f"{slot}", initial_tokens=[1, 2, 3], logit_processor_kwargs={ROUTE: route})
    return FutureRequestState(state, has_new_token, {}, num_tokens)


def choose(rows: list[FutureRequestState], logits: torch.Tensor) -> list[int]:
    sampler = BatchSampler()
    sampler.prepare_tensor_args(rows, torch.empty(0))
    chosen: list[int] = sampler(torch.empty(0), logits, torch.empty(0)).argmax(-1).tolist()
    return chosen


def test_each_row_of_a_batch_samples_in_its_own_way() -> None:
    logits = scores().repeat(4, 1)
    rows = [
        in_batch(0, Sampling(temperature=0)),
        in_batch(1, Sampling(temperature=2, top_k=1)),
        in_batch(2, Sampling(temperature=2, seed=7)),
        in_batch(3, Sampling(temperature=2, seed=8)),
    ]
    best = int(scores().argmax())
    chosen = choose(rows, logits)
    assert chosen[:2] == [best, best]
    assert chosen[2] != chosen[3]


def test_a_seeded_draw_does_not_depend_on_its_neighbours() -> None:
    seeded = Sampling(temperature=1, seed=42)
    alone = choose([in_batch(0, seeded)], scores()[None])
    others = [in_batch(1, Sampling(temperature=1)), in_batch(0, seeded), in_batch(2, Sampling(temperature=0))]
    assert choose(others, scores().repeat(3, 1))[1] == alone[0]


def test_draws_follow_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    counts = Counter(draw(logits, Sampling(temperature=1), generator) for _ in range(4000))
    for token, probability in enumerate(logits.softmax(0).tolist()):
        # three standard deviations of a binomial share are below 0.024
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.024)


def test_temperature_divides_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(draw(torch.tensor([0.0, 2.0]), Sampling(temperature=2), generator) for _ in range(4000))
    assert counts[1] / 4000 == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.024)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p: float) -> None:
    for seed in range(5):
        kept, tokens = nucleus(scores(seed), None, top_p)
        theirs = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scores(seed)[None])[0]
        assert sorted(tokens.tolist()) == theirs.isfinite().nonzero().flatten().tolist()
        assert torch.equal(kept, scores(seed)[tokens])


def test_a_flat_distribution_has_a_nucleus_beyond_the_first_candidates() -> None:
    _, tokens = nucleus(torch.zeros(V), None, 0.9)
    assert len(tokens) == pytest.approx(900, abs=1)


def test_top_k_is_cut_before_top_p_as_in_transformers() -> None:
    k, p = 20, 0.8
    filtered = TopPLogitsWarper(p)(torch.zeros(1, 1), TopKLogitsWarper(k)(torch.zeros(1, 1), scores()[None]))[0]
    allowed = set(filtered.isfinite().nonzero().flatten().tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = {draw(scores(), Sampling(temperature=1, top_k=k, top_p=p), generator) for _ in range(500)}
    assert len(allowed) > 1
    assert drawn <= allowed


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ours = scores()
    penalize(ours, torch.tensor([3, 5, 8]), 1.3)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 5, 8, 5]]), scores()[None])[0]
    assert torch.allclose(ours, theirs)


def test_tokens_carry_the_slot_of_their_request() -> None:
    sampler = BatchSampler()
    rows = [
        in_batch(2, Sampling(), num_tokens=3, has_new_token=False),
        in_batch(-1, Sampling()),
        in_batch(0, Sampling(), num_tokens=2),
    ]
    sampler.prepare_tensor_args(rows, torch.empty(0))
    assert sampler.slot_of_token.tolist() == [2, 2, 2, -1, 0, 0]


def test_a_request_that_is_pushed_back_goes_on_drawing() -> None:
    route = Route(slot=0, sampling=Sampling(seed=1))
    assert copy.deepcopy(route) is route


def test_a_request_without_a_route_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        BatchSampler().check_kwargs({"temperature": 1.0})
