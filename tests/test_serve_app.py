"""The application as its users meet it: over HTTP, with the official client."""

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
from greedy import assert_same, generate
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve
from tiny_models import tiny_llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cluster.catalog import find
from cluster.keys import KeyStore
from cluster.manifest import DataSource, Manifest
from cluster.models.fingerprint import base_fingerprint
from cluster.registry import Registry
from cluster.scopes import parse_scopes
from serve_apps.app import build
from serve_apps.args import ModelArgs, ServeArgs
from serve_apps.keyring import STALE_S

SMOLLM2 = "smollm2-135m-instruct"
QUESTIONS = [
    *("What is the capital of Japan?", "Name three primary colours.", "Who wrote Hamlet?", "What is 7 times 8?"),
    *("Describe the sea in one sentence.", "What do bees make?", "Give me a synonym of happy.", "Why is the sky blue?"),
    *("How many legs has a spider?", "What is the largest planet?", "Translate 'good morning' into French."),
    *("What is photosynthesis?", "Name a famous painter.", "What is the boiling point of water?", "Who was Newton?"),
    *(
        "日本の首都はどこですか？",
        "こんにちは。お元気ですか？",
        "富士山について教えてください。",
        "猫は好きですか？",
        "1+1は？",
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a folder, which is a model of the user's own."""
    folder = tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny-llama")
    model = tiny_base(folder)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start repeats one token for ever
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def tiny_base(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def register(base: Path, folder: Path, *, name: str, seed: int, fingerprint: str | None = None) -> Path:
    """Make an adapter that changes answers and register it; its PEFT folder is returned."""
    torch.manual_seed(seed)
    peft = get_peft_model(
        tiny_base(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.5)
    peft.save_pretrained(folder)
    card = find(str(base))
    manifest = Manifest(
        model=card.name,
        name=name,
        base_model_id=card.model_id,
        base_revision=None,
        base_fingerprint=fingerprint or base_fingerprint(card),
        precision="fp32",
        adapter={},
        plan={},
        data=DataSource(file="x.jsonl", sha256="0" * 64, num_samples=1, num_trained_tokens=1),
        metrics={},
        library_versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )
    Registry.default().add(folder, manifest)
    return folder


@pytest.fixture(scope="module", autouse=True)
def registry_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A registry without other tests' adapters, and no keys; the replicas inherit the variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(tmp_path_factory.mktemp("registry")))
        patch.setenv("KAJIYA_KEYS", str(tmp_path_factory.mktemp("keys")))
        yield


@pytest.fixture(scope="module")
def adapters(registry_of_the_module: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {name: register(tiny, home / name, name=name, seed=i) for i, name in enumerate(("shop", "poet"))}


@pytest.fixture(scope="module")
def url(
    smollm2: Path, tiny: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of an application with two models, on a Ray of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Sockets live in the folder, and their paths must be short.
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=f"/tmp/kj{port}", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = ServeArgs(models=[SMOLLM2, ModelArgs(model=str(tiny), max_num_seqs=16, max_model_len=256)])
        serve.run(build(args), name="kajiya")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(f"/tmp/kj{port}", ignore_errors=True)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240)


def ask(client: openai.OpenAI, question: str, *, model: str = SMOLLM2, **fields: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(**{"model": model, "messages": messages, "temperature": 0, **fields})


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_the_model_answers(client: openai.OpenAI) -> None:
    answer = ask(client, "What is the capital of Japan?")
    assert answer.choices[0].message.content == "The capital of Japan is Tokyo."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == SMOLLM2


def test_twenty_questions_at_once_are_answered_as_by_generate(client: openai.OpenAI, smollm2: Path) -> None:
    num_tokens = 12
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        options: dict[str, Any] = {"max_tokens": num_tokens, "extra_body": {"ignore_eos": True}}
        answers = list(pool.map(lambda q: ask(client, q, **options), QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        theirs = generate(model, prompt, num_tokens)
        text = answer.choices[0].message.content
        if text != tokenizer.decode(theirs, skip_special_tokens=True):
            assert_same(model, prompt, tokenizer(text, add_special_tokens=False).input_ids[:num_tokens], theirs)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == num_tokens
        assert answer.usage.total_tokens == len(prompt) + num_tokens
        assert answer.choices[0].finish_reason == "length"


def test_a_stream_says_the_same_as_a_whole_answer_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = ask(client, QUESTIONS[7], max_tokens=20)
    options: dict[str, Any] = {"max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, QUESTIONS[7], **options))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5  # it did stream


def test_a_stream_of_japanese_has_whole_characters_only(client: openai.OpenAI, tiny: Path) -> None:
    # every token of this model is a byte, so most characters of its prompt's language take three
    stream = ask(client, "研ぎ", model=tiny.name, max_tokens=60, temperature=1.5, seed=3, stream=True)
    streamed = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    whole = ask(client, "研ぎ", model=tiny.name, max_tokens=60, temperature=1.5, seed=3)
    assert "".join(streamed) == whole.choices[0].message.content


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = ask(client, QUESTIONS[7], max_tokens=30).choices[0].message.content
    stop = whole[20:26]
    answer = ask(client, QUESTIONS[7], max_tokens=30, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30
    assert text_of(ask(client, QUESTIONS[7], max_tokens=30, stop=stop, stream=True)) == whole[: whole.index(stop)]


def test_completions_continue_texts(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    answer = client.completions.create(model=SMOLLM2, prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    assert "four" in answer.choices[1].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    stream = client.completions.create(model=SMOLLM2, prompt=prompts[0], max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_several_answers_and_seeds(client: openai.OpenAI, tiny: Path) -> None:
    options: dict[str, Any] = {"model": tiny.name, "n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 4}
    first, second = (ask(client, "a", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]


def test_models_are_listed_with_their_adapters(client: openai.OpenAI, tiny: Path) -> None:
    assert {model.id for model in client.models.list()} == {
        *(SMOLLM2, tiny.name, f"{tiny.name}:shop", f"{tiny.name}:poet")
    }
    assert client.models.retrieve(f"{tiny.name}:shop@1").id == f"{tiny.name}:shop@1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(f"{tiny.name}:nobody")


def test_adapters_and_base_in_one_batch_answer_as_peft_does(
    client: openai.OpenAI, tiny: Path, adapters: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    loaded = {name: PeftModel.from_pretrained(tiny_base(tiny), folder) for name, folder in adapters.items()}
    asked = [(name, chr(97 + i)) for i, name in enumerate(["", "shop", "poet", "shop@1"] * 4)]

    def served(name_and_question: tuple[str, str]) -> Any:
        name, question = name_and_question
        model = f"{tiny.name}:{name}" if name else tiny.name
        return ask(client, question, model=model, max_tokens=10, extra_body={"ignore_eos": True})

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(served, asked))
    texts = set()
    for (name, question), answer in zip(asked, answers, strict=True):
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        model = loaded[name.partition("@")[0]] if name else tiny_base(tiny)
        expected = tokenizer.decode(generate(model, prompt, 10), skip_special_tokens=True)
        assert answer.choices[0].message.content == expected
        assert answer.model == (f"{tiny.name}:{name.partition('@')[0]}@1" if name else tiny.name)
        texts.add((name.partition("@")[0], expected))
    assert len({text for _, text in texts}) > 6  # adapters and questions do make a difference


def test_a_promotion_is_seen_without_a_restart(client: openai.OpenAI, tiny: Path, tmp_path: Path) -> None:
    register(tiny, tmp_path / "one", name="changing", seed=11)
    model = f"{tiny.name}:changing"
    before = ask(client, "z", model=model, max_tokens=10)
    register(tiny, tmp_path / "two", name="changing", seed=12)
    after = ask(client, "z", model=model, max_tokens=10)
    assert (before.model, after.model) == (f"{model}@1", f"{model}@2")
    assert before.choices[0].message.content != after.choices[0].message.content
    pinned = ask(client, "z", model=f"{model}@1", max_tokens=10)
    assert pinned.choices[0].message.content == before.choices[0].message.content


def test_more_adapters_than_slots_take_turns(client: openai.OpenAI, tiny: Path, tmp_path: Path) -> None:
    names = [f"many{i}" for i in range(12)]
    for i, name in enumerate(names):
        register(tiny, tmp_path / name, name=name, seed=100 + i)
    with ThreadPoolExecutor(12) as pool:
        first, second = (
            list(pool.map(lambda name: ask(client, "q", model=f"{tiny.name}:{name}", max_tokens=6), names))
            for _ in range(2)
        )
    assert [a.choices[0].message.content for a in first] == [a.choices[0].message.content for a in second]
    for name in names:
        Registry.default().remove(tiny.name, name)


def test_an_adapter_that_cannot_be_used_is_refused_and_the_engine_goes_on(
    client: openai.OpenAI, tiny: Path, tmp_path: Path
) -> None:
    register(tiny, tmp_path / "alien", name="alien", seed=1, fingerprint="0123456789abcdef")
    register(tiny, tmp_path / "broken", name="broken", seed=2)
    broken = Registry.default().resolve(tiny.name, "broken")
    (Path(broken.uri) / "adapter_model.safetensors").write_bytes(b"nothing")
    for name, words in (("alien", "trained on other weights"), ("broken", "is broken")):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, "q", model=f"{tiny.name}:{name}")
    with pytest.raises(openai.NotFoundError, match="shop"):
        ask(client, "q", model=f"{tiny.name}:nobody")
    assert ask(client, "q", model=f"{tiny.name}:shop", max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"extra_body": {"guided_regex": "a"}}, openai.BadRequestError, "guided_regex"),
        ({"messages": "hello"}, openai.BadRequestError, "messages"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"stream": True, "temperature": -1}, openai.BadRequestError, "temperature"),
    ],
)
def test_errors_have_openais_shape(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        ask(client, "q", **fields)
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["param"] == param


def test_a_body_that_is_not_json_is_a_400(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "message" in answer.json()["error"]


def active_requests() -> int:
    handle = serve.get_deployment_handle(f"TransformersServer:{SMOLLM2}", "kajiya")
    count: int = handle.num_active_requests.remote().result(timeout_s=60)
    return count


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_place(url: str, client: openai.OpenAI, *, is_stream: bool) -> None:
    ask(client, "Hi", max_tokens=1)
    body: dict[str, Any] = {"model": SMOLLM2, "messages": [{"role": "user", "content": "Tell me a very long story."}]}
    body |= {"max_tokens": 1900, "ignore_eos": True, "stream": is_stream}

    async def leave() -> int:
        async with httpx.AsyncClient(timeout=120) as http:
            async with asyncio.timeout(60):
                task = asyncio.create_task(_read_one_line(http, url, body))
                while (active := await asyncio.to_thread(active_requests)) == 0:
                    await asyncio.sleep(0.05)
                if is_stream:
                    await task
            task.cancel()
        return active

    assert asyncio.run(leave()) == 1
    deadline = time.monotonic() + 20  # 1900 tokens would take far longer
    while active_requests() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert active_requests() == 0


async def _read_one_line(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            assert json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk"
            return


@pytest.fixture
def keys() -> Iterator[KeyStore]:
    """The keys of the running application; without them it is open again."""
    store = KeyStore.default()
    yield store
    for file in Path(store.root).iterdir():
        file.unlink()
    time.sleep(STALE_S)


def test_a_running_endpoint_follows_its_keys(url: str, client: openai.OpenAI, keys: KeyStore, tiny: Path) -> None:
    assert ask(client, "Hi", max_tokens=1).usage.completion_tokens == 1  # open on this machine
    _, token = keys.create("tiny", scopes=parse_scopes([f"models:{tiny.name}"]), tokens_per_minute=1000)
    time.sleep(STALE_S)
    with pytest.raises(openai.AuthenticationError):
        ask(client, "Hi", max_tokens=1)
    ours = client.with_options(api_key=token)
    with pytest.raises(openai.PermissionDeniedError):
        ask(ours, "Hi", max_tokens=1)
    assert [model.id for model in ours.models.list()] == [tiny.name]
    raw = ours.chat.completions.with_raw_response.create(
        model=tiny.name, messages=[{"role": "user", "content": "Hi"}], max_tokens=10, temperature=0
    )
    assert 700 < int(raw.headers["x-ratelimit-remaining-tokens"]) < 990
    ask_all = {"max_tokens": 120, "n": 2, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.RateLimitError) as refused:  # after three times 240 tokens and what the questions take
        [ask(ours, "a", model=tiny.name, **ask_all) for _ in range(5)]
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
    keys.revoke("tiny")
    time.sleep(STALE_S)
    with pytest.raises(openai.AuthenticationError):
        list(ours.models.list())
