from typing import Any

import pytest
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from tiny_models import IM_END, byte_tokenizer
from transformers import GenerationConfig

from serve_apps.refusals import Refusal
from serve_apps.requests import Job, ModelLimits, default_sampling, read_chat, read_completion
from serve_apps.sampling import Sampling

LIMITS = ModelLimits(
    max_model_len=100, max_num_seqs=4, vocab_size=258, stop_token_ids=(IM_END,), defaults=Sampling(temperature=0.7)
)
HELLO = [{"role": "user", "content": "Hi"}]
# <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n: 3 special tokens, 4 + 1 + 2 + 1 + 9 + 1 bytes
HELLO_TOKENS = 21


def chat(**fields: Any) -> Job:
    return read_chat(ChatCompletionRequest(**{"messages": HELLO, **fields}), byte_tokenizer(), LIMITS)


def completion(**fields: Any) -> Job:
    return read_completion(CompletionRequest(**fields), byte_tokenizer(), LIMITS)


def refused(**fields: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        chat(**fields)
    return caught.value


def test_a_chat_goes_through_the_template_of_the_model() -> None:
    (answer,) = chat().answers
    assert byte_tokenizer().decode(answer.prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert len(answer.prompt_ids) == HELLO_TOKENS


def test_without_max_tokens_a_chat_may_fill_the_context_and_a_completion_gets_16() -> None:
    assert chat().answers[0].max_tokens == 100 - HELLO_TOKENS
    assert completion(prompt="Hi").answers[0].max_tokens == 16


def test_max_completion_tokens_comes_before_max_tokens() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).answers[0].max_tokens == 7


def test_what_a_request_leaves_open_is_the_models_recommendation() -> None:
    assert chat().answers[0].sampling == Sampling(temperature=0.7)
    config = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
    assert default_sampling(config) == Sampling(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
    assert default_sampling(GenerationConfig()) == Sampling()


def test_given_sampling_is_taken_over() -> None:
    sampling = chat(temperature=0.3, top_p=0.5, top_k=7, seed=11, repetition_penalty=1.2).answers[0].sampling
    assert sampling == Sampling(temperature=0.3, top_p=0.5, top_k=7, seed=11, repetition_penalty=1.2)
    assert chat(top_k=-1).answers[0].sampling.top_k == 0
    assert chat(top_p=0).answers[0].sampling.temperature == 0
    assert chat(temperature=1e-9).answers[0].sampling.temperature == 0


def test_several_answers_to_one_seed_differ() -> None:
    job = chat(n=3, seed=5)
    assert [answer.sampling.seed for answer in job.answers] == [5, 6, 7]
    assert job.num_prompt_tokens == HELLO_TOKENS


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [42, 43], [[42, 43]]])
def test_a_prompt_may_be_text_or_tokens_one_or_many(prompt: Any) -> None:
    (answer,) = completion(prompt=prompt).answers
    expected = byte_tokenizer()("Hi").input_ids if "Hi" in prompt else [42, 43]
    assert answer.prompt_ids == expected


def test_every_prompt_gets_n_answers_in_order() -> None:
    job = completion(prompt=["a", "b"], n=2)
    assert [byte_tokenizer().decode(answer.prompt_ids) for answer in job.answers] == ["a", "a", "b", "b"]


def test_stop_tokens_are_the_models_and_the_requests() -> None:
    assert chat(stop_token_ids=[9]).stop_token_ids == {IM_END, 9}
    assert chat(ignore_eos=True).stop_token_ids == set()
    assert chat(stop="\n").stop == ("\n",)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert chat(messages=[{"role": "user", "content": parts}]) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"logprob_token_ids": [1], "logprobs": True}, "logprob_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type='image_url'",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(200))}, "stop_token_ids"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param
    assert param in str(refusal)
    assert refusal.status == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False},
        {"frequency_penalty": 0},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"user": "somebody"},
        {"metadata": None},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


def test_what_does_not_fit_the_context_names_the_limit() -> None:
    refusal = refused(max_tokens=100 - HELLO_TOKENS + 1)
    assert refusal.code == "context_length_exceeded"
    assert "maximum context length is 100 tokens" in str(refusal)
    assert refused(messages=[{"role": "user", "content": "x" * 100}]).code == "context_length_exceeded"
    assert chat(max_tokens=100 - HELLO_TOKENS).answers[0].max_tokens == 100 - HELLO_TOKENS


@pytest.mark.parametrize("prompt", [[], [[]], ["a", ""]])
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(Refusal, match="empty"):
        completion(prompt=prompt)


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(Refusal, match="258"):
        completion(prompt=[5, 258])


def test_a_template_that_refuses_the_roles_is_the_clients_error() -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(Refusal, match="Roles must alternate"):
        read_chat(ChatCompletionRequest(messages=HELLO), tokenizer, LIMITS)


def test_a_model_without_a_template_points_at_completions() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Refusal, match="/v1/completions"):
        read_chat(ChatCompletionRequest(messages=HELLO), tokenizer, LIMITS)
