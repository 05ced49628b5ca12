from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from tiny_models import CHATML, IM_END, IM_START, byte_tokenizer

from serve_apps.refusals import Refusal
from serve_apps.tokenizing import detokenize, tokenize

HELLO = [{"role": "user", "content": "Hi"}]


def test_a_prompt_is_counted_and_shown() -> None:
    counted = tokenize(TokenizeCompletionRequest(prompt="Hi ", return_token_strs=True), byte_tokenizer(), 100)
    ids = byte_tokenizer()("Hi ").input_ids
    assert counted == {"count": 3, "max_model_len": 100, "tokens": ids, "token_strs": ["H", "i", "Ġ"]}


def test_a_conversation_is_counted_as_the_model_would_read_it() -> None:
    counted = tokenize(TokenizeChatRequest(messages=HELLO), byte_tokenizer(), 100)
    assert counted["tokens"] == byte_tokenizer().apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )
    assert counted["token_strs"] is None
    without = tokenize(TokenizeChatRequest(messages=HELLO, add_generation_prompt=False), byte_tokenizer(), 100)
    assert counted["count"] - without["count"] == 11  # <|im_start|>, 9 letters, a line break


def test_tools_count_where_the_template_takes_them() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{# <tool_call> #}" + CHATML
    with_tool = tokenize(TokenizeChatRequest(messages=HELLO, tools=[tool]), byte_tokenizer(template), 100)
    assert with_tool["tokens"][:3] == byte_tokenizer()("add").input_ids
    with pytest.raises(Refusal, match="tools"):
        tokenize(TokenizeChatRequest(messages=HELLO, tools=[tool]), byte_tokenizer(), 100)


def test_tokens_become_text_again_with_the_special_ones_written_out() -> None:
    ids = [IM_START, *byte_tokenizer()("é").input_ids, IM_END]
    assert detokenize(DetokenizeRequest(tokens=ids), byte_tokenizer(), 258) == {"prompt": "<|im_start|>é<|im_end|>"}


@pytest.mark.parametrize(("fields", "param"), [({"tokens": [258]}, "tokens"), ({"tokens": [1], "x": 1}, "x")])
def test_what_is_no_token_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        detokenize(DetokenizeRequest(**fields), byte_tokenizer(), 258)
    assert caught.value.param == param
