from typing import Any

import jsonschema
import pytest
from ray.serve.llm.openai_api_models import ChatCompletionRequest

from serve_apps.refusals import Refusal
from serve_apps.tools import ToolUse, calls_schema, read_tools

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "$defs": {"City": {"type": "string", "minLength": 1}}}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}


def use(choice: Any = "required", tools: Any = (WEATHER, NOW), **fields: Any) -> ToolUse:
    messages = [{"role": "user", "content": "Hi"}]
    read = read_tools(ChatCompletionRequest(messages=messages, tools=list(tools), tool_choice=choice, **fields))
    assert read is not None
    return read


def is_valid(schema: dict[str, Any], calls: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(calls))


def test_the_schema_of_calls_takes_calls_of_the_tools_and_nothing_else() -> None:
    schema = calls_schema(use())
    oslo = {"name": "weather", "arguments": {"city": "Oslo"}}
    now = {"name": "now", "arguments": {}}
    assert is_valid(schema, [oslo])
    assert is_valid(schema, [oslo, now])
    assert not is_valid(schema, [])
    assert not is_valid(schema, [{"name": "weather", "arguments": {"city": ""}}])
    assert not is_valid(schema, [{"name": "weather", "arguments": {}}])
    assert not is_valid(schema, [oslo | {"name": "now2"}])
    assert not is_valid(schema, oslo)


def test_a_named_tool_and_single_calls_bound_the_list() -> None:
    now = {"name": "now", "arguments": {}}
    named = calls_schema(use({"type": "function", "function": {"name": "now"}}))
    assert is_valid(named, [now])
    assert not is_valid(named, [now, now])
    assert not is_valid(named, [{"name": "weather", "arguments": {"city": "Oslo"}}])
    assert not is_valid(calls_schema(use(parallel_tool_calls=False)), [now, now])


def test_two_tools_cannot_define_one_type_in_two_ways() -> None:
    other = {"type": "object", "properties": {}, "$defs": {"City": {"type": "integer"}}}
    with pytest.raises(Refusal, match="City"):
        calls_schema(use(tools=(WEATHER, {"type": "function", "function": {"name": "b", "parameters": other}})))


def test_without_a_choice_the_model_decides() -> None:
    auto = use("auto")
    assert not auto.is_forced
    assert auto.max_calls is None
    assert auto.names == {"weather", "now"}
