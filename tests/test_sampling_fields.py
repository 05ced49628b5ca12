from typing import Any

import pytest
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from tiny_models import IM_END, byte_tokenizer

from serve_apps.refusals import Refusal
from serve_apps.requests import Job, ModelLimits, read_chat, read_completion
from serve_apps.sampling import Sampling

LIMITS = ModelLimits(
    max_model_len=100, max_num_seqs=4, vocab_size=258, stop_token_ids=(IM_END,), defaults=Sampling(temperature=0.7)
)
TOKENIZER = byte_tokenizer()
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

STRUCTURAL_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}],
    "triggers": ["<a>"],
}


def chat(**fields: Any) -> Job:
    return read_chat(ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], **fields), TOKENIZER, LIMITS)


def completion(**fields: Any) -> Job:
    return read_completion(CompletionRequest(prompt="Hi", **fields), TOKENIZER, LIMITS)


def sampling(job: Job) -> Sampling:
    return job.answers[0].sampling


def json_schema(schema: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_penalties_bias_and_bounds_are_taken_over() -> None:
    given = {"presence_penalty": -2, "frequency_penalty": 1.5, "logit_bias": {"5": -100, "257": 3}, "min_p": 0.1}
    assert sampling(chat(**given, min_tokens=4)) == Sampling(
        temperature=0.7,
        presence_penalty=-2,
        frequency_penalty=1.5,
        logit_bias=((5, -100.0), (257, 3.0)),
        min_p=0.1,
        min_tokens=4,
    )


def test_a_chat_asks_for_logprobs_with_two_fields_and_a_completion_with_one() -> None:
    assert sampling(chat()).num_logprobs is None
    assert sampling(chat(logprobs=True)).num_logprobs == 0
    assert sampling(chat(logprobs=True, top_logprobs=20)).num_logprobs == 20
    assert sampling(completion()).num_logprobs is None
    assert sampling(completion(logprobs=0)).num_logprobs == 0
    assert sampling(completion(logprobs=5)).num_logprobs == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": json_schema(None)}, "response_format"),
        ({"response_format": json_schema({"type": "strng"})}, "response_format"),
        ({"response_format": json_schema({"type": "array", "uniqueItems": True})}, "response_format"),
        ({"response_format": STRUCTURAL_TAG}, "response_format.type='structural_tag'"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"logprobs": 6}, "logprobs"), ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of")],
)
def test_completions_refuse_by_name_too(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_a_refused_schema_says_why() -> None:
    with pytest.raises(Refusal, match="uniqueItems"):
        chat(response_format=json_schema({"type": "array", "uniqueItems": True}))


def test_a_response_format_binds_every_answer_and_the_same_one_is_compiled_once() -> None:
    first, second = chat(response_format=json_schema(SCHEMA), n=2).answers
    assert first.sampling.grammar is not None
    assert first.sampling.grammar is second.sampling.grammar
    assert sampling(completion(response_format=json_schema(SCHEMA))).grammar is first.sampling.grammar
    assert sampling(chat(response_format={"type": "json_object"})).grammar is not first.sampling.grammar
    assert sampling(chat(response_format={"type": "text"})).grammar is None
