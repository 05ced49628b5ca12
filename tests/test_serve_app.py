"""The application as its users meet it: over HTTP, with the official client.

What any engine has to answer is in `test_conformance.py`; here are batches, adapters that come and go, keys, and
clients that leave.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from greedy import assert_same, generate
from peft import PeftModel
from ray import serve
from registered import manifest_of, peft_folder
from serving import serving
from tiny_models import lively_tiny_folder, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.catalog import find
from cluster.home import kajiya_home
from cluster.keys import KeyStore
from cluster.registry import Registry
from cluster.scopes import parse_scopes
from serve_apps.args import ModelArgs, ServeArgs
from serve_apps.keyring import STALE_S

pytestmark = pytest.mark.cluster

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
    return lively_tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


def register(base: Path, folder: Path, *, name: str, seed: int, fingerprint: str | None = None) -> Path:
    """Make an adapter that changes answers and register it; its PEFT folder is returned."""
    manifest = manifest_of(find(str(base)), name)
    if fingerprint is not None:
        manifest = manifest.model_copy(update={"base_fingerprint": fingerprint})
    Registry.default().add(peft_folder(base, folder, seed=seed), manifest)
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
def url(smollm2: Path, tiny: Path, adapters: dict[str, Path]) -> Iterator[str]:
    """The address of an application with two models."""
    models: list[str | ModelArgs] = [SMOLLM2, ModelArgs(model=str(tiny), max_num_seqs=16, max_model_len=256)]
    with serving(ServeArgs(models=models)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240)


def ask(client: openai.OpenAI, question: str, *, model: str = SMOLLM2, **fields: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(**{"model": model, "messages": messages, "temperature": 0, **fields})


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


def test_a_stream_of_japanese_has_whole_characters_only(client: openai.OpenAI, tiny: Path) -> None:
    # every token of this model is a byte, so most characters of its prompt's language take three
    stream = ask(client, "研ぎ", model=tiny.name, max_tokens=60, temperature=1.5, seed=3, stream=True)
    streamed = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    whole = ask(client, "研ぎ", model=tiny.name, max_tokens=60, temperature=1.5, seed=3)
    assert "".join(streamed) == whole.choices[0].message.content


def test_openais_client_which_closes_at_the_last_event_has_not_left_early(client: openai.OpenAI) -> None:
    before = len(audit_lines())
    list(ask(client, "Hi", max_tokens=4, stream=True))
    deadline = time.monotonic() + 5
    while len(audit_lines()) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert audit_lines()[-1]["status"] == 200
    assert audit_lines()[-1]["num_completion_tokens"] == 4


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
    assert audit_lines()[-1]["status"] == 499  # no failure of the server's


def audit_lines() -> list[dict[str, Any]]:
    file = kajiya_home() / "logs" / "audit.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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
