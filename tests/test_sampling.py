import copy
import math

import pytest
import torch
from tiny_models import IM_END, byte_tokenizer
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from serve_apps.grammar import Grammar, compile_grammar
from serve_apps.sampling import ROUTE, BatchSampler, Route, Sampling

V = 1000
PROMPT = [1, 2, 3]


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def in_batch(
    slot: int,
    sampling: Sampling,
    *,
    num_tokens: int = 1,
    has_new_token: bool = True,
    stop_token_ids: tuple[int, ...] = (),
) -> FutureRequestState:
    route = Route(slot=slot, sampling=sampling, stop_token_ids=stop_token_ids)
    state = RequestState(request_id=f"{slot}", initial_tokens=PROMPT, logit_processor_kwargs={ROUTE: route})
    return FutureRequestState(state, has_new_token, {}, num_tokens)


def choose(rows: list[FutureRequestState], logits: torch.Tensor) -> list[int]:
    sampler = BatchSampler()
    sampler.prepare_tensor_args(rows, torch.empty(0))
    chosen: list[int] = sampler(torch.empty(0), logits, torch.empty(0)).argmax(-1).tolist()
    return chosen


def choose_in_turn(sampling: Sampling, logits: list[float], num_tokens: int, **more: tuple[int, ...]) -> list[int]:
    """The tokens of a model that says the same at every place."""
    row = in_batch(-1, sampling, **more)  # type: ignore[arg-type]
    return [choose([row], torch.tensor([logits]))[0] for _ in range(num_tokens)]


def route_of(row: FutureRequestState) -> Route:
    route = row.state.logit_processor_kwargs[ROUTE]
    assert isinstance(route, Route)
    return route


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


def test_a_plain_greedy_row_is_left_to_the_argmax() -> None:
    assert (
        in_batch(0, Sampling(temperature=0, seed=3, top_k=5, top_p=0.5)).state.logit_processor_kwargs[ROUTE].is_argmax
    )
    before = scores()[None]
    after = before.clone()
    choose([in_batch(0, Sampling(temperature=0))], after)
    assert torch.equal(before, after)


def test_logprobs_are_the_models_own_whatever_changes_the_choice() -> None:
    # softmax of log 1, log 2, log 5 is 1/8, 2/8, 5/8
    logits = [math.log(1), math.log(2), math.log(5)]
    changed = Sampling(temperature=0, logit_bias=((0, 100.0),), num_logprobs=2)
    row = in_batch(-1, changed)
    assert choose([row], torch.tensor([logits])) == [0]
    (told,) = route_of(row).logprobs
    assert told.token_id == 0
    assert told.logprob == pytest.approx(math.log(1 / 8))
    assert [token for token, _ in told.top] == [2, 1]
    assert [logprob for _, logprob in told.top] == pytest.approx([math.log(5 / 8), math.log(2 / 8)])


def test_no_top_logprobs_tell_of_the_chosen_token_alone() -> None:
    row = in_batch(-1, Sampling(temperature=0, num_logprobs=0))
    choose([row], torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    (told,) = route_of(row).logprobs
    assert (told.token_id, told.top) == (2, ())
    assert told.logprob == pytest.approx(1 - math.log(3 + math.e))


def test_who_does_not_ask_for_logprobs_gets_none() -> None:
    row = in_batch(-1, Sampling(temperature=1, presence_penalty=1))
    choose([row], torch.zeros(1, 4))
    assert route_of(row).logprobs == []


def test_a_bias_of_100_forces_a_token_and_minus_100_bans_it() -> None:
    assert choose_in_turn(Sampling(temperature=1, logit_bias=((1, 100.0),)), [9.0, -9.0, 9.0], 20) == [1] * 20
    assert set(choose_in_turn(Sampling(temperature=1, logit_bias=((0, -100.0),)), [9.0, 0.0, 0.0], 50)) == {1, 2}


def test_a_frequency_penalty_wears_a_token_out() -> None:
    # 3.0 against 2.0, less 0.6 per use:
    #   3.0-0.0, 2.0 -> 0;  2.4, 2.0 -> 0;  1.8, 2.0 -> 1;  1.8, 1.4 -> 0;  1.2, 1.4 -> 1;  1.2, 0.8 -> 0
    sampling = Sampling(temperature=0, frequency_penalty=0.6)
    assert choose_in_turn(sampling, [3.0, 2.0, -9.0], 6) == [0, 0, 1, 0, 1, 0]


def test_a_presence_penalty_counts_once() -> None:
    # 3.0 -> 1.5 and stays there; then 2.0 -> 0.5 and stays there
    assert choose_in_turn(Sampling(temperature=0, presence_penalty=1.5), [3.0, 2.0, -9.0], 4) == [0, 1, 0, 0]


def test_penalties_leave_the_prompt_alone() -> None:
    logits = [0.0, 2.0, 1.0]  # tokens 1 and 2 are in the prompt
    assert choose_in_turn(Sampling(temperature=0, presence_penalty=2), logits, 1) == [1]
    assert choose_in_turn(Sampling(temperature=0, repetition_penalty=100.0), [0.1, 2.0, 1.0, 0.0], 1) == [0]


def test_stop_tokens_wait_for_min_tokens() -> None:
    sampling = Sampling(temperature=0, min_tokens=2)
    assert choose_in_turn(sampling, [5.0, 4.0, 0.0], 3, stop_token_ids=(0,)) == [1, 1, 0]


def test_a_grammar_lets_only_its_own_tokens_through() -> None:
    tokenizer = byte_tokenizer()
    grammar = compile_grammar(Grammar.from_json_schema({"enum": [7, 42]}), tokenizer, (IM_END,))
    row = in_batch(-1, Sampling(temperature=0, grammar=grammar))
    four, two = tokenizer("42").input_ids
    logits = torch.zeros(len(tokenizer))
    logits[four] = 1.0
    chosen = [choose([row], logits[None].clone())[0] for _ in range(3)]
    assert chosen == [four, two, IM_END]
    assert route_of(row).error is None


def test_tokens_carry_the_slot_of_their_request() -> None:
    sampler = BatchSampler()
    rows = [
        in_batch(2, Sampling(), num_tokens=3, has_new_token=False),
        in_batch(-1, Sampling()),
        in_batch(0, Sampling(), num_tokens=2),
    ]
    sampler.prepare_tensor_args(rows, torch.empty(0))
    assert sampler.slot_of_token.tolist() == [2, 2, 2, -1, 0, 0]


def test_a_request_that_is_pushed_back_goes_on_where_it_was() -> None:
    row = in_batch(-1, Sampling(temperature=0, frequency_penalty=0.6))
    logits = torch.tensor([[3.0, 2.0, -9.0, -9.0]])
    first = choose([row], logits.clone())[0]
    row.state.generated_tokens.append(first)
    row.state = row.state.create_equivalent_initial_request()  # its tokens are in the prompt now
    assert [first, *(choose([row], logits.clone())[0] for _ in range(2))] == [0, 0, 1]
    assert copy.deepcopy(route_of(row)) is route_of(row)


def test_a_request_without_a_route_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        BatchSampler().check_kwargs({"temperature": 1.0})
