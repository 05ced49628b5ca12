"""Every way of choosing tokens, in mixed batches of a real engine."""

import asyncio
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import torch
from greedy import limits
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from test_grammar import SCHEMAS
from tiny_models import IM_END, byte_tokenizer, tiny_llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from serve_apps.engine import Engine, Progress
from serve_apps.grammar import Grammar, compile_grammar
from serve_apps.logprobs import TokenLogprobs
from serve_apps.requests import ModelLimits
from serve_apps.runtime import Runtime
from serve_apps.sampling import Sampling
from serve_apps.server import TransformersServer

TOKENIZER = byte_tokenizer()
GREEDY = Sampling(temperature=0)
PROMPTS = [[(7 * i + 3 * t) % 256 + 2 for t in range(1 + 5 * i)] for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tiny_llama_folder(tmp_path_factory.mktemp("tiny"))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start is so flat that every choice is close
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    engine = Engine(copy.deepcopy(model), limits(max_model_len=512))
    engine.start()
    yield engine
    engine.stop()


async def ask(engine: Engine, name: str, prompt_ids: list[int], sampling: Sampling, num_tokens: int) -> Progress:
    """All that the engine tells about one answer, as one progress."""
    arrived: asyncio.Queue[Progress] = asyncio.Queue()
    engine.submit(
        name, prompt_ids, max_tokens=num_tokens, stop_token_ids=[IM_END], sampling=sampling, slot=-1,
        on_progress=arrived.put_nowait,
    )  # fmt: skip
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    while True:
        progress = await arrived.get()
        assert progress.error is None, progress.error
        token_ids += progress.token_ids
        logprobs += progress.logprobs
        if progress.is_finished:
            return Progress(token_ids=token_ids, is_finished=True, logprobs=logprobs)


def ask_all(engine: Engine, samplings: list[Sampling], num_tokens: int = 12) -> list[Progress]:
    async def all_at_once() -> list[Progress]:
        asked = enumerate(zip(PROMPTS, samplings, strict=False))
        return await asyncio.gather(*(ask(engine, f"{i}", ids, s, num_tokens) for i, (ids, s) in asked))

    return asyncio.run(all_at_once())


MIXED = [
    Sampling(temperature=0, num_logprobs=3),
    Sampling(temperature=1, seed=1, num_logprobs=0),
    GREEDY,
    Sampling(temperature=2, seed=2, num_logprobs=20, top_p=0.9),
    Sampling(temperature=0, num_logprobs=1, repetition_penalty=1.5, frequency_penalty=1, logit_bias=((65, 5.0),)),
    Sampling(temperature=1, seed=3, top_k=5),
    Sampling(temperature=1, seed=4, num_logprobs=2, min_p=0.01, presence_penalty=2, min_tokens=12),
    GREEDY,
]


def test_logprobs_are_those_of_a_plain_forward_pass_whoever_else_is_in_the_batch(
    engine: Engine, model: PreTrainedModel
) -> None:
    for prompt, sampling, told in zip(PROMPTS, MIXED, ask_all(engine, MIXED), strict=True):
        if sampling.num_logprobs is None:
            assert told.logprobs == []
            continue
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *told.token_ids]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert len(told.logprobs) == len(told.token_ids)
        for place, one in enumerate(told.logprobs):
            assert one.token_id == told.token_ids[place]
            assert one.logprob == pytest.approx(float(expected[place, one.token_id]), abs=1e-4)
            assert len(one.top) == sampling.num_logprobs
            for token_id, logprob in one.top:
                assert logprob == pytest.approx(float(expected[place, token_id]), abs=1e-4)
            likeliest = expected[place].topk(sampling.num_logprobs).values.tolist()
            assert [logprob for _, logprob in one.top] == pytest.approx(likeliest, abs=1e-4)


def test_a_neighbours_wishes_change_nothing(engine: Engine) -> None:
    mixed = ask_all(engine, MIXED)
    plain = ask_all(engine, [GREEDY] * len(MIXED))
    assert [mixed[i].token_ids for i in (2, 7)] == [plain[i].token_ids for i in (2, 7)]
    again = ask_all(engine, MIXED)
    assert [one.token_ids for one in again] == [one.token_ids for one in mixed]  # seeds hold


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_kept_at_temperature_1_in_a_mixed_batch(engine: Engine, name: str) -> None:
    grammar = compile_grammar(Grammar.from_json_schema(SCHEMAS[name]), TOKENIZER, (IM_END,))
    bound = [Sampling(temperature=1, seed=seed, grammar=grammar) for seed in range(5)]
    answers = ask_all(engine, [*bound, Sampling(temperature=0, grammar=grammar, num_logprobs=1), GREEDY], 300)
    for told in answers[:6]:
        assert told.token_ids[-1] == IM_END
        value = json.loads(TOKENIZER.decode(told.token_ids, skip_special_tokens=True))
        jsonschema.validate(value, SCHEMAS[name], format_checker=jsonschema.FormatChecker())


def test_a_grammar_that_is_lost_ends_the_answer_with_an_error(engine: Engine) -> None:
    compiled = compile_grammar(Grammar.from_json_schema({"type": "object"}), TOKENIZER, (IM_END,))
    compiled.matcher.consume_token(TOKENIZER("x").input_ids[0])
    lost = Sampling(temperature=0, grammar=compiled)
    with pytest.raises(AssertionError, match="too complex to follow"):
        ask_all(engine, [lost])


@pytest.fixture
def server(engine: Engine) -> TransformersServer:
    return server_of(engine, TOKENIZER)


def server_of(engine: Engine, tokenizer: Any) -> TransformersServer:
    limits = ModelLimits(
        max_model_len=512,
        max_num_seqs=8,
        vocab_size=len(tokenizer),
        stop_token_ids=(tokenizer.eos_token_id,),
        defaults=GREEDY,
    )
    runtime = Runtime(engine=engine, tokenizer=tokenizer, adapters=cast(Any, None), limits=limits)
    return TransformersServer(LLMConfig(model_loading_config={"model_id": "m"}), runtime)


def whole(server: TransformersServer, **fields: Any) -> dict[str, Any]:
    """The body of an answer; its fields are a chat's or, with `prompt`, a completion's."""

    async def one() -> Any:
        answers = (
            server.completions(CompletionRequest(model="m", **fields))
            if "prompt" in fields
            else server.chat(ChatCompletionRequest(model="m", **fields))
        )
        return await anext(answers)

    body: dict[str, Any] = asyncio.run(one()).model_dump()
    return body


def streamed(server: TransformersServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all chunks."""

    async def text() -> str:
        request = ChatCompletionRequest(model="m", stream=True, **fields)
        return "".join([item async for item in server.chat(request)])

    events = [event.removeprefix("data: ") for event in asyncio.run(text()).split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [choice for event in events for choice in json.loads(event)["choices"]]


HELLO = [{"role": "user", "content": "こんにちは"}]


def test_a_stream_tells_the_logprobs_of_the_whole_answer(server: TransformersServer) -> None:
    # bytes of a random model: half characters everywhere, and the stop string holds text back
    fields = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 3, "temperature": 1, "seed": 5}
    fields |= {"max_tokens": 60, "stop": ["e", "zz"]}
    body = whole(server, **fields)
    chunks = streamed(server, **fields)
    assert len(body["choices"]) == 3
    for choice in body["choices"]:
        parts = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        told = [one for part in parts if part.get("logprobs") for one in part["logprobs"]["content"]]
        wanted = choice["logprobs"]["content"]
        assert [(one["token"], one["bytes"]) for one in told] == [(one["token"], one["bytes"]) for one in wanted]
        for one, other in zip(told, wanted, strict=True):
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert [top["token"] for top in one["top_logprobs"]] == [top["token"] for top in other["top_logprobs"]]
        text = "".join(part["delta"].get("content") or "" for part in parts)
        assert text == choice["message"]["content"]
        written = b"".join(bytes(one["bytes"]) for one in told if not one["token"].startswith("<|im_"))
        assert written.decode(errors="replace").startswith(text)
    num_tokens = sum(len(choice["logprobs"]["content"]) for choice in body["choices"])
    assert num_tokens == body["usage"]["completion_tokens"]


def test_offsets_of_a_completion_point_into_its_text(server: TransformersServer) -> None:
    bias = {str(TOKENIZER(char).input_ids[0]): 100 for char in "abc"}  # whole characters only
    (choice,) = whole(
        server, prompt="x", logprobs=2, temperature=1, seed=1, max_tokens=20, ignore_eos=True, logit_bias=bias
    )["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "".join(told["tokens"])
    assert set(choice["text"]) <= {"a", "b", "c"}
    assert told["text_offset"] == list(range(20))
    assert all(2 <= len(top) <= 3 for top in told["top_logprobs"])


def test_bans_and_least_lengths_hold_over_http_fields(server: TransformersServer) -> None:
    first = whole(server, messages=HELLO, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"][0]
    token_id = TOKENIZER.convert_tokens_to_ids(TOKENIZER.backend_tokenizer.encode("x").tokens)[0]
    assert first["bytes"] != [ord("x")]
    forced = whole(server, messages=HELLO, max_tokens=5, logit_bias={str(token_id): 100})
    assert forced["choices"][0]["message"]["content"] == "xxxxx"
    ended = whole(server, messages=HELLO, max_tokens=9, logit_bias={str(IM_END): 100}, min_tokens=4)
    assert ended["usage"]["completion_tokens"] == 5
    assert ended["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("seed", [1, 2])
def test_the_embedded_model_answers_in_json(smollm2: Path, seed: int) -> None:
    schema = SCHEMAS["pydantic"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    engine = Engine(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval(), limits(max_num_seqs=4))
    engine.start()
    try:
        body = whole(
            server_of(engine, tokenizer),
            messages=[{"role": "user", "content": "Describe a person as JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
            temperature=1,
            seed=seed,
            n=2,
            max_tokens=200,
        )
    finally:
        engine.stop()
    for choice in body["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
