"""An application that the conformance suite asks, on either engine, and how it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from registered import manifest_of, peft_folder
from serving import serving
from tiny_models import CHATML, byte_tokenizer, lively_tiny_folder
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cluster.catalog import find
from cluster.registry import Registry
from serve_apps.args import ModelArgs, ServeArgs

Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = ("transformers", "vllm")
WITHOUT_EMBEDDINGS = ("vllm",)
SMOLLM2 = "smollm2-135m-instruct"
CAPITAL = "What is the capital of Japan?"
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{# <tool_call> </think> #}" + CHATML
    + "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
)  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Tokyo", "Oslo"]}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "poet": (4, ("q_proj", "v_proj", "up_proj")),
    "shop": (2, ("q_proj", "v_proj")),
    "cook": (8, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "law": (1, ("down_proj", "o_proj")),
    "haiku": (3, ("gate_proj",)),
    "news": (5, ("k_proj", "up_proj")),
    "tour": (6, ("o_proj",)),
    "care": (7, ("q_proj", "k_proj", "down_proj")),
}
"""Rank and target modules of the tiny model's adapters, by name."""
NOW = {"type": "function", "function": {"name": "now", "description": "Tell the time."}}


@dataclass(frozen=True, kw_only=True)
class Served:
    """An application under test."""

    engine: str
    url: str
    tiny: Path
    adapters: dict[str, Path]
    """PEFT's folder of each of `ADAPTERS`."""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def served_by(engine: Engine, home: Path) -> Iterator[Served]:
    """Serve SmolLM2 and a tiny model with eight adapters on `engine`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(home / "registry"))
        tiny = lively_tiny_folder(home / "tiny-llama", head_dim=32)  # vLLM's attention for CPUs has no narrower heads
        byte_tokenizer(TEMPLATE).save_pretrained(tiny)
        adapters = {
            name: peft_folder(tiny, home / name, seed=seed, r=r, target_modules=target_modules)
            for seed, (name, (r, target_modules)) in enumerate(ADAPTERS.items())
        }
        for name, folder in adapters.items():
            Registry.default().add(folder, manifest_of(find(str(tiny)), name))
        models: list[str | ModelArgs] = [
            ModelArgs(model=SMOLLM2, engine=engine),
            ModelArgs(model=str(tiny), engine=engine, max_num_seqs=16, max_model_len=512),
        ]
        with serving(ServeArgs(models=models)) as url:
            yield Served(engine=engine, url=url, tiny=tiny, adapters=adapters)


@lru_cache
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def ask(served: Served, question: str = CAPITAL, **fields: Any) -> Any:
    body = {"model": SMOLLM2, "messages": [{"role": "user", "content": question}], "temperature": 0}
    return served.client.chat.completions.create(**{**body, **fields})


def prompt_of(folder: Path, question: str) -> list[int]:
    message = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer(folder).apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return ids


def byte_ids(folder: Path) -> dict[bytes, int]:
    """Return the token of each byte, and those with a name, of a model whose tokens are bytes."""
    known = tokenizer(folder)
    ids = {bytes([byte]): known.convert_tokens_to_ids(letter) for byte, letter in bytes_to_unicode().items()}
    return ids | {name.encode(): token_id for name, token_id in known.get_added_vocab().items()}


def post(served: Served, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{served.url}{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()
