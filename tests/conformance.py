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
NOW = {"type": "function", "function": {"name": "now", "description": "Tell the time."}}


@dataclass(frozen=True, kw_only=True)
class Served:
    """An application under test."""

    engine: str
    url: str
    tiny: Path
    adapter: Path
    """PEFT's folder of `tiny:poet`."""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def served_by(engine: Engine, home: Path) -> Iterator[Served]:
    """Serve SmolLM2 and a tiny model with an adapter on `engine`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(home / "registry"))
        tiny = lively_tiny_folder(home / "tiny-llama", head_dim=32)  # vLLM's attention for CPUs has no narrower heads
        byte_tokenizer(TEMPLATE).save_pretrained(tiny)
        adapter = peft_folder(tiny, home / "poet", seed=1)
        Registry.default().add(adapter, manifest_of(find(str(tiny)), "poet"))
        models: list[str | ModelArgs] = [
            ModelArgs(model=SMOLLM2, engine=engine),
            ModelArgs(model=str(tiny), engine=engine, max_num_seqs=8, max_model_len=512),
        ]
        with serving(ServeArgs(models=models)) as url:
            yield Served(engine=engine, url=url, tiny=tiny, adapter=adapter)


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


def post(served: Served, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{served.url}{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()
