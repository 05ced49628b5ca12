from functools import cache
from pathlib import Path
from typing import Any

import go_template
import pytest
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from tiny_models import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from cluster import chat_templates
from cluster.catalog import find
from cluster.catalog_rows import ROWS
from cluster.models.base import load_tokenizer
from cluster.ollama_template import (
    ANSWER,
    ASK,
    CONVERSATIONS,
    SYSTEM,
    NoOllamaTemplate,
    families,
    ollama_template,
)
from serve_apps.conversations import read_conversation
from train_jobs.rendering import render

DEEPSEEK_END = "<｜end▁of▁sentence｜>"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOLLM2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHATML = "<|im_start|>user\n日本の首都は?\nOne word.<|im_end|>\n<|im_start|>assistant\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n日本の首都は?\nOne word."
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
STABLELM = (
    "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n### 指示: \n日本の首都は?\nOne word."
    "\n\n### 応答: \n"
)
CATALOG = {
    "smollm2-135m-instruct": ("chatml_smollm2", "<|im_start|>", "<|im_end|>", SMOLLM2 + CHATML),
    "qwen2.5-14b-instruct": ("chatml_qwen", None, "<|im_end|>", QWEN + CHATML),
    "qwen2.5-32b-instruct": ("chatml_qwen", None, "<|im_end|>", QWEN + CHATML),
    "calm3-22b-chat": ("chatml", "<|endoftext|>", "<|im_end|>", CHATML),
    "deepseek-r1-distill-qwen-32b-japanese": (
        *("deepseek_r1", "<｜begin▁of▁sentence｜>", DEEPSEEK_END),
        "<｜begin▁of▁sentence｜><｜User｜>日本の首都は?\nOne word.<｜Assistant｜>",
    ),
    "elyza-japanese-llama-2-7b-instruct": (
        *("llama2_elyza", "<s>", "</s>"),
        "<s>[INST] 日本の首都は?\nOne word. [/INST]",
    ),
    "japanese-gpt2-small": (
        *("rinna_plain", "<s>", "</s>"),
        "ユーザー: 日本の首都は?\nOne word.\nアシスタント: ",
    ),
    "japanese-stablelm-3b-4e1t-instruct": ("stablelm_ja", "<|endoftext|>", "<|endoftext|>", STABLELM),
    "llama-3.1-70b-instruct": ("llama3_1", "<|begin_of_text|>", "<|eot_id|>", LLAMA),
    "phi-3.5-moe-instruct": ("phi3", "<s>", "<|end|>", "<|user|>\n日本の首都は?\nOne word.<|end|>\n<|assistant|>\n"),
}
"""Family, BOS, end of a turn, and the prompt of one question as the model's publisher documents it."""


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the template of the catalog's model: bytes for those of the hub."""
    card = find(name)
    if card.model_id == "embedded:smollm2":
        return load_tokenizer(card)
    family, bos, eos, _ = CATALOG[name]
    tokenizer = byte_tokenizer(card.chat_template or chat_templates.read(family))
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    return tokenizer


def by_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """Render as Ollama's server does: system messages joined in `.System`, and all in `.Messages`."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    given = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return go_template.render(template, {"System": system, "Messages": given, "Tools": [], "Response": ""})


def served(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    prompt_ids = read_conversation(ChatCompletionRequest(messages=messages), tokenizer).prompt_ids
    return str(tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False))


def test_the_catalog_is_covered() -> None:
    assert set(CATALOG) == {card.name for card in ROWS}


@pytest.mark.parametrize("name", CATALOG)
def test_ollama_is_given_what_is_trained_and_served(name: str) -> None:
    tokenizer = tokenizer_of(name)
    ours = ollama_template(tokenizer, ())
    assert by_ollama(ours.template, [ASK]) == CATALOG[name][3]
    for messages in CONVERSATIONS:
        trained = render([dict(m) for m in messages], tokenizer, add_generation_prompt=True)
        assert by_ollama(ours.template, messages) == trained == served(tokenizer, messages)


@pytest.mark.parametrize("name", CATALOG)
def test_a_trained_answer_continues_the_prompt_that_ollama_sends(name: str) -> None:
    tokenizer = tokenizer_of(name)
    prompt = by_ollama(ollama_template(tokenizer, ()).template, [SYSTEM, ASK])
    through = render([dict(m) for m in (SYSTEM, ASK, ANSWER)], tokenizer)
    assert through.startswith((prompt + ANSWER["content"], f"{prompt} {ANSWER['content']}"))


def test_every_go_template_has_its_jinja_and_a_model() -> None:
    assert set(families()) == {family for family, *_ in CATALOG.values()} | {"deepseek_r1_think"}
    for family in families():
        assert chat_templates.read(family)


def test_stop_words_are_the_tokens_at_which_serving_stops() -> None:
    card = find("smollm2-135m-instruct")
    tokenizer = load_tokenizer(card)
    assert ollama_template(tokenizer, card.stop_token_ids).stop == ("<|im_end|>",)
    assert ollama_template(tokenizer, (0, 2)).stop == ("<|endoftext|>", "<|im_end|>")


class Prefixing:
    """A tokenizer that puts BOS before every text, as Llama's does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    bos_token_id = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str) -> Any:
        encoded = self.tokenizer(text)
        encoded["input_ids"] = [self.bos_token_id, *encoded["input_ids"]]
        return encoded


def test_the_first_token_is_written_once() -> None:
    # llama.cpp puts BOS before the prompt of such a tokenizer; a second one would not be what was trained
    tokenizer = tokenizer_of("llama-3.1-70b-instruct")
    text = by_ollama(ollama_template(Prefixing(tokenizer), ()).template, [ASK])
    assert tokenizer.bos_token + text == LLAMA
    with pytest.raises(NoOllamaTemplate, match="would begin each prompt"):
        ollama_template(Prefixing(tokenizer_of("calm3-22b-chat")), ())


def test_a_template_of_a_known_family_may_begin_with_bos() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}" + chat_templates.read("chatml"))
    tokenizer.bos_token = "<s>"
    assert by_ollama(ollama_template(tokenizer, ()).template, [ASK]) == "<s>" + CHATML


def test_a_template_of_no_known_family_is_named_so() -> None:
    with pytest.raises(NoOllamaTemplate, match="no Go template"):
        ollama_template(byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"), ())


def test_package_data_names_the_go_templates() -> None:
    assert "chat_templates/*.gotmpl" in (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
