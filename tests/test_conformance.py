"""What a client of OpenAI's API may rely on, whichever engine answers.

The same tests run on every engine. Answers are compared with transformers' own `generate` and forward pass, so engines
that pass are alike. `ENGINES` says which run here.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from conformance import (
    ADAPTERS,
    CAPITAL,
    ENGINES,
    NOW,
    SMOLLM2,
    WEATHER,
    WITHOUT_EMBEDDINGS,
    Served,
    ask,
    byte_ids,
    post,
    prompt_of,
    served_by,
    tokenizer,
)
from greedy import assert_same, generate
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from peft import PeftModel
from pydantic import BaseModel
from refused_bodies import CHAT, OTHERS
from tiny_models import tiny_base
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_by(request.param, tmp_path_factory.mktemp("conformance")) as served:
        yield served


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return model


# Text


@pytest.mark.parametrize("question", [CAPITAL, "Why is the sky blue?", "富士山について教えてください。"])
def test_a_greedy_answer_is_generates(served: Served, reference: PreTrainedModel, smollm2: Path, question: str) -> None:
    answer = ask(served, question, max_tokens=12, extra_body={"ignore_eos": True})
    prompt = prompt_of(smollm2, question)
    theirs = generate(reference, prompt, 12)
    text = answer.choices[0].message.content
    if text != tokenizer(smollm2).decode(theirs, skip_special_tokens=True):
        ours = tokenizer(smollm2)(text, add_special_tokens=False).input_ids[:12]
        assert_same(reference, prompt, ours, theirs)
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
    }


def test_an_answer_that_ends_by_itself_says_stop_and_a_cut_one_length(served: Served) -> None:
    whole = ask(served)
    assert whole.choices[0].message.content == "The capital of Japan is Tokyo."
    assert whole.choices[0].finish_reason == "stop"
    cut = ask(served, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


def test_a_stream_says_the_same_in_chunks_and_usage_when_asked(served: Served) -> None:
    whole = ask(served, "Why is the sky blue?", max_tokens=20)
    options = {"max_tokens": 20, "stream": True}
    chunks = list(ask(served, "Why is the sky blue?", stream_options={"include_usage": True}, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(ask(served, "Why is the sky blue?", **options))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_completions_continue_each_prompt_n_times(served: Served, smollm2: Path) -> None:
    options: dict[str, Any] = {"model": SMOLLM2, "max_tokens": 4, "temperature": 0}
    ids = tokenizer(smollm2)("One, two, three,").input_ids
    answer = served.client.completions.create(prompt=["The capital of France is", "One, two, three,"], n=2, **options)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert "Paris" in texts[0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert served.client.completions.create(prompt=ids, **options).choices[0].text == texts[2]
    stream = served.client.completions.create(prompt=ids, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts[2]


def test_a_stop_text_ends_the_answer_before_it(served: Served) -> None:
    answer = ask(served, stop=["Tokyo", "London"])
    assert answer.choices[0].message.content == "The capital of Japan is "
    assert answer.choices[0].finish_reason == "stop"


def test_answers_to_one_seed_differ_and_come_again(served: Served) -> None:
    options: dict[str, Any] = {"model": served.tiny.name, "n": 3, "max_tokens": 10, "temperature": 1, "seed": 5}
    texts = [[choice.message.content for choice in ask(served, "a", **options).choices] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_developer_is_a_system_and_parts_are_one_text(served: Served) -> None:
    def answered(role: str, content: Any) -> str:
        messages = [{"role": role, "content": "Answer in one word."}, {"role": "user", "content": content}]
        return str(ask(served, messages=messages, max_tokens=8).choices[0].message.content)

    plain = answered("system", CAPITAL)
    assert answered("developer", CAPITAL) == plain
    halves = [{"type": "text", "text": CAPITAL[:9]}, {"type": "text", "text": CAPITAL[9:]}]
    assert answered("system", halves) == plain


def test_what_names_somebody_changes_nothing(served: Served) -> None:
    fields: dict[str, Any] = {"user": "u1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert ask(served, max_tokens=5, **fields).choices == ask(served, max_tokens=5).choices


# Choice of tokens


def test_logprobs_are_the_models(served: Served, reference: PreTrainedModel, smollm2: Path) -> None:
    answer = ask(served, max_tokens=4, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert bytes(b for one in content for b in one.bytes).decode() == answer.choices[0].message.content
    prompt = prompt_of(smollm2, CAPITAL)
    ids = tokenizer(smollm2)(answer.choices[0].message.content, add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for one, row, token_id in zip(content, expected, ids, strict=True):
        assert one.logprob == pytest.approx(float(row[token_id]), abs=2e-3)
        top = row.topk(3)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(top.values.tolist(), abs=2e-3)
        assert one.top_logprobs[0].token == one.token  # greedy
    streamed = [c.choices[0] for c in ask(served, max_tokens=4, logprobs=True, top_logprobs=3, stream=True)]
    assert [one.token for choice in streamed if choice.logprobs for one in choice.logprobs.content or ()] == [
        one.token for one in content
    ]


def test_logprobs_of_completions_are_columns(served: Served) -> None:
    answer = served.client.completions.create(
        model=SMOLLM2, prompt="One, two, three,", max_tokens=3, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == answer.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs or ()] == [2, 2, 2]
    assert all(value <= 0 for value in logprobs.token_logprobs or ())


def test_a_bias_forces_and_forbids_tokens(served: Served, smollm2: Path) -> None:
    (tokyo,) = tokenizer(smollm2)(" Tokyo", add_special_tokens=False).input_ids
    forced = ask(served, max_tokens=3, logit_bias={str(tokyo): 100})
    assert forced.choices[0].message.content == " Tokyo Tokyo Tokyo"
    assert " Tokyo" not in ask(served, max_tokens=8, logit_bias={str(tokyo): -100}).choices[0].message.content


def test_penalties_count_the_answers_tokens(served: Served, reference: PreTrainedModel, smollm2: Path) -> None:
    prompt: list[int] = tokenizer(smollm2)("one one one one one one").input_ids
    presence, frequency = 0.5, 1.5
    expected: list[int] = []
    for _ in range(10):
        with torch.no_grad():
            scores = reference(torch.tensor([prompt + expected])).logits[0, -1]
        for token_id in set(expected):
            scores[token_id] -= presence + frequency * expected.count(token_id)
        expected.append(int(scores.argmax()))
    options: dict[str, Any] = {"model": SMOLLM2, "prompt": prompt, "max_tokens": 10, "temperature": 0}
    penalties: dict[str, Any] = {"presence_penalty": presence, "frequency_penalty": frequency}
    penalized = served.client.completions.create(**options, **penalties).choices[0].text
    assert penalized == tokenizer(smollm2).decode(expected)
    assert penalized != served.client.completions.create(**options).choices[0].text


# Form of the answer


def test_a_schema_is_kept(served: Served) -> None:
    class Person(BaseModel):
        name: str
        age: int

    answer = served.client.chat.completions.parse(
        model=SMOLLM2,
        messages=[{"role": "user", "content": "Describe Ada, who is 36, in JSON."}],
        response_format=Person,
        max_tokens=60,
        temperature=0,
    )
    assert answer.choices[0].message.parsed is not None
    assert isinstance(answer.choices[0].message.parsed.age, int)


def test_any_object_is_json(served: Served) -> None:
    answer = ask(served, "Give me a person as JSON.", response_format={"type": "json_object"}, max_tokens=60)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced_on_any_model(served: Served, choice: Any) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    answer = ask(served, "Weather in Oslo for 2 days?", max_tokens=80, **fields)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"
    with served.client.chat.completions.stream(
        model=SMOLLM2,
        messages=[{"role": "user", "content": "Weather in Oslo for 2 days?"}],
        temperature=0,
        max_tokens=80,
        **fields,
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls is not None
    assert [c.function.arguments for c in streamed.message.tool_calls] == [call.function.arguments]
    assert [c.function.name for c in streamed.message.tool_calls] == ["weather"]


def test_a_template_that_takes_tools_lets_the_model_decide(served: Served) -> None:
    fields: dict[str, Any] = {"model": served.tiny.name, "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    with_tools = ask(served, "a", tools=[WEATHER, NOW], **fields)
    assert with_tools.usage.prompt_tokens > ask(served, "a", **fields).usage.prompt_tokens + 100
    assert not with_tools.choices[0].message.tool_calls
    hidden = ask(served, "a", tools=[WEATHER, NOW], tool_choice="none", **fields)
    assert hidden.choices == ask(served, "a", **fields).choices


def test_a_result_can_be_sent_back(served: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Noon."},
    ]
    answer = ask(served, model=served.tiny.name, messages=messages, tools=[NOW], max_tokens=2)
    assert answer.usage.completion_tokens <= 2


def test_thoughts_are_not_content(served: Served) -> None:
    fields: dict[str, Any] = {"model": served.tiny.name, "max_tokens": 12}
    on = {"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": True}}
    whole = ask(served, "a", extra_body=on, **fields).choices[0].message
    assert whole.content == ""
    assert whole.reasoning_content
    streamed = [c.choices[0].delta for c in ask(served, "a", extra_body=on, stream=True, **fields)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in streamed) == whole.reasoning_content
    assert not any(delta.content for delta in streamed)
    off = ask(served, "a", extra_body={"ignore_eos": True}, **fields).choices[0].message
    assert off.content
    assert not hasattr(off, "reasoning_content")


# Adapters, embeddings, tokens


def test_an_adapter_answers_as_peft_does(served: Served) -> None:
    prompt = prompt_of(served.tiny, "b")
    peft = PeftModel.from_pretrained(tiny_base(served.tiny), served.adapters["poet"])
    expected = tokenizer(served.tiny).decode(generate(peft, prompt, 10), skip_special_tokens=True)
    fields: dict[str, Any] = {"max_tokens": 10, "extra_body": {"ignore_eos": True}}
    for name in (f"{served.tiny.name}:poet", f"{served.tiny.name}:poet@1"):
        answer = ask(served, "b", model=name, **fields)
        assert answer.choices[0].message.content == expected
        assert answer.model == f"{served.tiny.name}:poet@1"
    assert ask(served, "b", model=served.tiny.name, **fields).choices[0].message.content != expected


def test_sixteen_answers_in_one_batch_are_each_that_of_its_own_adapter(served: Served) -> None:
    peers = {name: PeftModel.from_pretrained(tiny_base(served.tiny), path) for name, path in served.adapters.items()}
    asked = [(name, question) for question in ("x", "a longer question") for name in peers]
    assert len(asked) == 16
    ids = byte_ids(served.tiny)

    def tokens_of(name_and_question: tuple[str, str]) -> list[int]:
        name, question = name_and_question
        fields: dict[str, Any] = {"max_tokens": 16, "logprobs": True, "extra_body": {"ignore_eos": True}}
        answer = ask(served, question, model=f"{served.tiny.name}:{name}", **fields)
        return [ids[bytes(token.bytes)] for token in answer.choices[0].logprobs.content]

    for _ in range(2):  # the first time, adapters are loaded while others answer
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(tokens_of, asked))
        for (name, question), ours in zip(asked, answers, strict=True):
            prompt = prompt_of(served.tiny, question)
            assert_same(peers[name], prompt, ours, generate(peers[name], prompt, 16))
        assert len({tuple(ours) for ours in answers}) > len(peers)  # adapters and questions do make a difference


def test_models_are_listed_with_their_adapters(served: Served) -> None:
    names = {model.id for model in served.client.models.list()}
    assert names == {SMOLLM2, served.tiny.name, *(f"{served.tiny.name}:{name}" for name in ADAPTERS)}
    assert served.client.models.retrieve(SMOLLM2).id == SMOLLM2


def test_embeddings_are_means_of_the_last_hidden_states(
    served: Served, reference: PreTrainedModel, smollm2: Path
) -> None:
    texts = ["The sea is blue.", "Bread."]
    if served.engine in WITHOUT_EMBEDDINGS:
        with pytest.raises(openai.BadRequestError) as caught:
            served.client.embeddings.create(model=SMOLLM2, input=texts)
        assert caught.value.param == "model"
        return
    ids = [tokenizer(smollm2)(text).input_ids for text in texts]
    with torch.no_grad():
        expected = torch.stack(
            [reference(torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0].mean(0) for one in ids]
        )
    answers = [
        served.client.embeddings.create(model=SMOLLM2, input=texts),  # the client asks for base64 by itself
        served.client.embeddings.create(model=SMOLLM2, input=texts, encoding_format="float"),
        served.client.embeddings.create(model=SMOLLM2, input=ids),
    ]
    for answer in answers:
        rows = torch.tensor([one.embedding for one in answer.data])
        torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    base, adapted = (
        served.client.embeddings.create(model=name, input="a").data[0].embedding
        for name in (served.tiny.name, f"{served.tiny.name}:poet")
    )
    assert base != adapted


def test_tokens_are_counted_and_decoded(served: Served, smollm2: Path) -> None:
    ids = tokenizer(smollm2)("Hello, world").input_ids
    counted = post(served, "/tokenize", model=SMOLLM2, prompt="Hello, world", return_token_strs=True)
    assert counted["tokens"] == ids
    assert counted["count"] == len(ids) == len(counted["token_strs"])
    assert counted["max_model_len"] > 0
    assert post(served, "/detokenize", model=SMOLLM2, tokens=ids) == {"prompt": "Hello, world"}
    parts = [{"role": "user", "content": [{"type": "text", "text": CAPITAL}]}]
    assert post(served, "/tokenize", model=SMOLLM2, messages=parts)["tokens"] == prompt_of(smollm2, CAPITAL)


# Shapes


def test_bodies_are_what_the_clients_types_say(served: Served) -> None:
    chat = {"model": SMOLLM2, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "logprobs": True}
    ChatCompletion.model_validate(post(served, "/v1/chat/completions", **chat))
    forced: dict[str, Any] = {"tools": [NOW], "tool_choice": "required", "parallel_tool_calls": False}
    ChatCompletion.model_validate(post(served, "/v1/chat/completions", **(chat | forced | {"max_tokens": 40})))
    Completion.model_validate(post(served, "/v1/completions", model=SMOLLM2, prompt="Hi", max_tokens=2, logprobs=1))
    Model.model_validate(httpx.get(f"{served.url}/v1/models/{SMOLLM2}").json())
    if served.engine not in WITHOUT_EMBEDDINGS:
        CreateEmbeddingResponse.model_validate(post(served, "/v1/embeddings", model=SMOLLM2, input="Hi"))
    stream = httpx.post(f"{served.url}/v1/chat/completions", json=chat | {"stream": True}, timeout=120)
    assert stream.headers["content-type"].startswith("text/event-stream")
    *events, done, end = stream.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for event in events:
        ChatCompletionChunk.model_validate_json(event.removeprefix("data: "))


@pytest.mark.parametrize(("fields", "status", "param"), CHAT)
def test_an_error_names_the_field(served: Served, fields: dict[str, Any], status: int, param: str) -> None:
    body = {"model": SMOLLM2, "messages": [{"role": "user", "content": "q"}]} | fields
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]


def test_a_prompt_beyond_the_context_is_named_so(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, "x" * 600, model=served.tiny.name)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(model=served.tiny.name, prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("path", "body", "param"), OTHERS)
def test_other_endpoints_name_the_field_too(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{served.url}{path}", json={"model": SMOLLM2} | body, timeout=60)
    assert answer.status_code == 400
    if not (path == "/v1/embeddings" and served.engine in WITHOUT_EMBEDDINGS):
        assert answer.json()["error"]["param"] == param
