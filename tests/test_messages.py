from typing import Any

import pytest

from serve_apps.messages import plain_messages
from serve_apps.refusals import Refusal

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call_1"},
]


def test_a_developer_is_a_system_to_the_template() -> None:
    assert plain_messages([{"role": "developer", "content": "Be brief."}], takes_tools=False) == [
        {"role": "system", "content": "Be brief."}
    ]


def test_arguments_of_earlier_calls_become_objects() -> None:
    assert plain_messages(HISTORY, takes_tools=True) == [
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]


def test_thoughts_that_a_client_sends_back_are_given_to_the_template() -> None:
    (message,) = plain_messages(
        [{"role": "assistant", "content": "4", "reasoning": "2 + 2", "refusal": None}], takes_tools=False
    )
    assert message == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert plain_messages([{"role": "user", "content": parts}], takes_tools=False)[0]["content"] == "abc"


@pytest.mark.parametrize(
    ("messages", "takes_tools", "param"),
    [
        ([], True, "messages"),
        (HISTORY, False, "messages[1].tool_calls"),
        ([{"role": "tool", "content": "2", "tool_call_id": "x"}], False, "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "2", "tool_call_id": "x"}], True, "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "2"}], True, "messages[0].tool_call_id"),
        ([{"role": "critic", "content": "2"}], True, "messages[0].role='critic'"),
        ([{"role": "user", "content": "2", "name": "Bo"}], True, "messages[0].name"),
        ([{"role": "user", "content": "2", "tool_calls": [CALL]}], True, "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "add", "arguments": "{a"}}]}],
            True,
            "messages[0].tool_calls[0]",
        ),
        (
            [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "add", "arguments": "[1]"}}]}],
            True,
            "messages[0].tool_calls[0]",
        ),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}], True, "messages[0].tool_calls[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            True,
            "messages[0].content[0].type='image_url'",
        ),
    ],
)
def test_what_the_model_cannot_read_is_refused_by_name(
    messages: list[dict[str, Any]], takes_tools: bool, param: str
) -> None:
    with pytest.raises(Refusal) as caught:
        plain_messages(messages, takes_tools=takes_tools)
    assert caught.value.param == param
    assert param in str(caught.value)
