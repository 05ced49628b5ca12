from typing import Any

import pytest

from cluster import chat_templates
from cluster.catalog import find
from cluster.catalog_rows import ROWS

SYSTEM = {"role": "system", "content": "あなたは親切です。"}
ASK = {"role": "user", "content": "日本の首都は?"}
ANSWER = {"role": "assistant", "content": "東京です。"}


def render(name: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Render as `apply_chat_template` does: its own environment of Jinja."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template: Any = _compile_jinja_template(chat_templates.read(name))
    text = template.render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>"
    )
    return str(text)


def test_elyza_speaks_llama_2() -> None:
    # the format of Meta's reference code: [INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s>
    head = "<s>[INST] <<SYS>>\nあなたは親切です。\n<</SYS>>\n\n日本の首都は? [/INST]"
    assert render("llama2_elyza", [SYSTEM, ASK], add_generation_prompt=True) == head
    whole = render("llama2_elyza", [SYSTEM, ASK, ANSWER, ASK], add_generation_prompt=True)
    assert whole == f"{head} 東京です。 </s><s>[INST] 日本の首都は? [/INST]"


def test_elyza_without_a_system_message() -> None:
    assert render("llama2_elyza", [ASK], add_generation_prompt=True) == "<s>[INST] 日本の首都は? [/INST]"


def test_elyza_refuses_turns_out_of_order() -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="alternate"):
        render("llama2_elyza", [ANSWER, ASK], add_generation_prompt=True)


def test_stablelm_writes_instruction_input_and_answer() -> None:
    text = render("stablelm_ja", [SYSTEM, ASK], add_generation_prompt=True)
    assert text.endswith("\n\n### 指示: \nあなたは親切です。\n\n### 入力: \n日本の首都は?\n\n### 応答: \n")
    assert text.startswith("以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。")
    alone = render("stablelm_ja", [ASK, ANSWER], add_generation_prompt=False)
    assert alone.endswith("\n\n### 指示: \n日本の首都は?\n\n### 応答: \n東京です。</s>")


def test_rinna_names_the_speakers() -> None:
    text = render("rinna_plain", [SYSTEM, ASK, ANSWER, ASK], add_generation_prompt=True)
    assert text == (
        "あなたは親切です。\nユーザー: 日本の首都は?\nアシスタント: 東京です。</s>\n"
        "ユーザー: 日本の首都は?\nアシスタント: "
    )


@pytest.mark.parametrize("name", ["llama2_elyza", "stablelm_ja", "rinna_plain"])
def test_a_prompt_is_a_prefix_of_the_dialogue_that_it_becomes(name: str) -> None:
    # what the loss mask relies on: the tokens of the answer are what the answer adds
    prompt = render(name, [SYSTEM, ASK], add_generation_prompt=True)
    assert render(name, [SYSTEM, ASK, ANSWER], add_generation_prompt=False).startswith(prompt)


def test_every_row_can_chat() -> None:
    brought = {card.name for card in ROWS if card.chat_template}
    assert brought == {
        "elyza-japanese-llama-2-7b-instruct",
        "japanese-gpt2-small",
        "japanese-stablelm-3b-4e1t-instruct",
    }
    assert all(card.chat_template or card.has_tokenizer_chat_template for card in ROWS)
    assert find("japanese-gpt2-small").chat_template == chat_templates.read("rinna_plain")
