import json
from typing import Any

import pytest
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from tiny_models import CHATML, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from serve_apps.conversations import Conversation, read_conversation
from serve_apps.message_stream import Reading
from serve_apps.refusals import Refusal

HELLO = [{"role": "user", "content": "Hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
SUB = {"type": "function", "function": {"name": "sub", "description": "Subtract."}}
# What the templates of Qwen2.5 and Llama 3.1 do, in a few lines.
HERMES = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{# <tool_call> #}" + CHATML
LLAMA = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% for t in tools or [] %}{{ t | tojson }}"
    "{% endfor %}{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}{{ '\"parameters\": ' }}{% endif %}"
    "{% if m.role == 'ipython' or m.role == 'tool' %}ipython{% endif %}{% endfor %}"
)
THINKING = (
    CHATML + "{% if '</think>' in messages[-1].content %}{% endif %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


def read(template: str = CHATML, **fields: Any) -> Conversation:
    return read_conversation(ChatCompletionRequest(**{"messages": HELLO, **fields}), byte_tokenizer(template))


def prompt_of(conversation: Conversation) -> str:
    return str(byte_tokenizer().decode(conversation.prompt_ids))


def refused(template: str = CHATML, **fields: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(template, **fields)
    return caught.value


def test_the_prompt_is_what_the_template_makes_of_the_messages() -> None:
    conversation = read()
    assert conversation.prompt_ids == byte_tokenizer().apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )
    assert conversation.reading == Reading()


def test_tools_are_declared_to_a_template_that_takes_them() -> None:
    conversation = read(HERMES, tools=[ADD, SUB])
    declared = prompt_of(conversation).partition("<|im_start|>")[0]
    assert '"name": "add"' in declared
    assert '"description": "Subtract."' in declared
    assert conversation.reading == Reading(call_format="hermes", names=frozenset({"add", "sub"}))


def test_each_family_of_templates_tells_how_its_model_writes_calls() -> None:
    assert read(LLAMA, tools=[ADD]).reading.call_format == "llama3_json"
    assert read(HERMES, tools=[ADD], tool_choice="required").reading.call_format == "json_list"


def test_tools_without_a_place_in_the_template_are_refused_unless_a_call_is_forced() -> None:
    refusal = refused(tools=[ADD])
    assert refusal.param == "tools"
    assert 'tool_choice="required"' in str(refusal)
    conversation = read(tools=[ADD, SUB], tool_choice={"type": "function", "function": {"name": "sub"}})
    prompt = prompt_of(conversation)
    assert prompt.startswith("<|im_start|>system\nYou can call")
    function = {"name": "sub", "description": "Subtract.", "parameters": {"type": "object", "properties": {}}}
    assert json.dumps(function) in prompt
    assert '"add"' not in prompt
    assert conversation.reading == Reading(call_format="json_list", names=frozenset({"sub"}), max_calls=1)


def test_the_description_of_tools_follows_the_clients_own_system_message() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    prompt = prompt_of(read(messages=messages, tools=[ADD], tool_choice="required"))
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call")
    assert prompt.count("<|im_start|>system") == 1


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert read(tools=[ADD], tool_choice="none") == read()
    assert read(HERMES, tools=[ADD], tool_choice="none") == read(HERMES)


def test_calls_may_be_one_at_a_time() -> None:
    assert read(HERMES, tools=[ADD], parallel_tool_calls=False).reading.max_calls == 1
    assert read(HERMES, tools=[ADD]).reading.max_calls is None


def test_a_prompt_that_opens_the_thinking_is_answered_within_it() -> None:
    assert read(THINKING).reading.thinking == "has_begun"
    off = read(THINKING, chat_template_kwargs={"enable_thinking": False})
    assert off.reading.thinking == "may_begin"
    assert not prompt_of(off).endswith("<think>\n")


def test_variables_reach_the_template_that_reads_them() -> None:
    template = CHATML + "{{ reasoning_effort }}{{ date_string }}"
    conversation = read(template, reasoning_effort="low", chat_template_kwargs={"date_string": " today"})
    assert prompt_of(conversation).endswith("low today")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"tools": [ADD, ADD], "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
    ],
)
def test_what_the_template_cannot_carry_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_a_strict_tool_is_refused_where_nothing_binds_its_arguments() -> None:
    strict = {"type": "function", "function": ADD["function"] | {"strict": True}}  # type: ignore[operator]
    assert refused(HERMES, tools=[strict]).param == "tools[0].function.strict"
    assert read(HERMES, tools=[strict], tool_choice="required").tools is not None


def test_a_model_without_a_template_points_at_completions() -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Refusal, match="/v1/completions"):
        read_conversation(ChatCompletionRequest(messages=HELLO), tokenizer)
