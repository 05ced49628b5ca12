"""The application on vLLM, over HTTP: an int8 checkpoint, adapters of the registry, refusals, clients that leave."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from quantized import int8_folder
from ray import serve
from registered import manifest_of, peft_folder
from serving import serving
from tiny_models import lively_tiny_folder

from cluster.catalog import find
from cluster.registry import Registry
from serve_apps.args import ModelArgs, ServeArgs

pytestmark = pytest.mark.cluster

NAME = "smollm2-w8a8"
TINY = "tiny-vllm"
CAPITAL = "What is the capital of Japan?"
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def quantized(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int8_folder(smollm2, tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_tiny_folder(tmp_path_factory.mktemp("models") / "tiny-vllm", head_dim=32)


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry with two adapters, one whose rank is beyond the plan, and one of another base."""
    home = tmp_path_factory.mktemp("adapters")
    card = find(str(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(home / "registry"))
        for seed, (name, r) in enumerate({"shop": 4, "poet": 8, "large": 16}.items()):
            Registry.default().add(peft_folder(tiny, home / name, seed=seed, r=r), manifest_of(card, name))
        alien = manifest_of(card, "alien").model_copy(update={"base_fingerprint": "0123456789abcdef"})
        Registry.default().add(home / "shop", alien)
        yield home


@pytest.fixture(scope="module")
def url(quantized: Path, tiny: Path, adapters: Path) -> Iterator[str]:
    models = [
        # No engine is named: only vLLM takes it, and the plan knows.
        ModelArgs(model=str(quantized), max_model_len=2048, max_num_seqs=2),
        ModelArgs(model=str(tiny), engine="vllm", max_model_len=256, max_num_seqs=8, num_adapters=2, max_lora_rank=8),
    ]
    with serving(ServeArgs(models=list(models))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, question: str = CAPITAL, *, model: str = TINY, **fields: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(**{"model": model, "messages": messages, "temperature": 0, **fields})


def scores_of(answer: Any) -> Any:
    """The log-probabilities of an answer: adapters may choose the same tokens, but not with the same scores."""
    return pytest.approx([token.logprob for token in answer.choices[0].logprobs.content], abs=1e-3)


def test_eight_bit_weights_are_eight_bit_and_answer_with_sense(url: str, smollm2: Path, quantized: Path) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": CAPITAL}], "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["x-kajiya-engine"] == "vllm"
    assert answer.headers["x-kajiya-precision"] == "compressed-tensors"
    choice = answer.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The capital of Japan is Tokyo.", "stop")
    refused = httpx.post(f"{url}/v1/chat/completions", json=body | {"model": f"{NAME}:shop@1"}, timeout=60)
    assert refused.status_code == 404
    # 106,168,320 weights of linears take 1 byte instead of 4, the other 28,346,688 values keep theirs.
    saved = (smollm2 / "model.safetensors").stat().st_size - (quantized / "model.safetensors").stat().st_size
    assert saved == pytest.approx(3 * 106_168_320, rel=0.01)


def test_two_adapters_and_the_base_in_one_batch_answer_as_alone(client: openai.OpenAI) -> None:
    questions = ("Name three colours.", "What do bees make?")
    asked = [(f"{TINY}:{name}@1" if name else TINY, q) for q in questions for name in ("", "shop", "poet")]

    def served(model_and_question: tuple[str, str]) -> Any:
        model, question = model_and_question
        return ask(client, question, model=model, max_tokens=NUM_TOKENS, logprobs=True)

    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(served, asked))
    assert [answer.model for answer in together] == [model for model, _ in asked]
    for i, answer in enumerate(together):
        told = [token.logprob for token in answer.choices[0].logprobs.content]
        assert told == scores_of(served(asked[i]))
        # Adapters and questions do make a difference.
        assert all(told != scores_of(other) for other in together[:i])


def test_a_promotion_is_followed_and_a_third_adapter_makes_room(
    client: openai.OpenAI, tiny: Path, adapters: Path
) -> None:
    card = find(str(tiny))
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "logprobs": True}
    first = ask(client, model=f"{TINY}:shop", **options)
    Registry.default().add(adapters / "poet", manifest_of(card, "shop"))
    Registry.default().add(adapters / "shop", manifest_of(card, "third"))
    second = ask(client, model=f"{TINY}:shop", **options)
    third = ask(client, model=f"{TINY}:third", **options)
    assert (first.model, second.model) == (f"{TINY}:shop@1", f"{TINY}:shop@2")
    told = [token.logprob for token in third.choices[0].logprobs.content]
    assert told == scores_of(first)
    assert told != scores_of(second)


@pytest.mark.parametrize(
    ("adapter", "status", "message"),
    [
        ("alien", 400, "trained on other weights (0123456789abcdef)"),
        ("large", 400, "r is 16; this plan holds ranks up to 8"),
        ("nobody", 404, "has no adapter 'nobody'"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    client: openai.OpenAI, adapter: str, status: int, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, model=f"{TINY}:{adapter}", max_tokens=2)
    assert caught.value.status_code == status
    assert message in str(caught.value)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["param"] == "model"
    assert ask(client, max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_leaves_frees_its_place(url: str) -> None:
    server = serve.get_deployment_handle(f"VllmServer:{NAME}", "kajiya")

    def num_active() -> int:
        count: int = server.num_active_requests.remote().result(timeout_s=60)
        return count

    body = {"model": NAME, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 1900, "stream": True}
    assert num_active() == 0  # a handle's first call takes long
    with (
        httpx.Client(timeout=60) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=body | {"ignore_eos": True}) as response,
    ):
        events = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line)
        next(event for event in events if event["choices"][0]["delta"].get("content"))  # the role comes before a place
        assert num_active() == 1
    deadline = time.monotonic() + 10  # 1900 tokens would take longer
    while num_active() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert num_active() == 0
