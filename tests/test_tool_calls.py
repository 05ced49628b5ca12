import json
from typing import Any

import pytest

from serve_apps.tool_calls import CallFormat, CallStream

NAMES = frozenset({"weather", "add"})
WEATHER = '{"name": "weather", "arguments": {"city": "東京", "note": "a } in \\"text\\" {"}}'
ADD = '{"name": "add", "arguments": {"terms": [1, {"x": 2}]}}'


def read(text: str, call_format: CallFormat, cuts: list[int] | None = None, **options: Any) -> Any:
    """What a client puts together from the deltas: content, and (name, arguments) of each call."""
    stream = CallStream(call_format, NAMES, **options)
    pieces = [text[a:b] for a, b in zip([0, *(cuts or [])], [*(cuts or []), len(text)], strict=True)]
    content = ""
    calls: dict[int, dict[str, str]] = {}
    for i, piece in enumerate(pieces):
        new, deltas = stream.push(piece, is_last=i == len(pieces) - 1)
        content += new
        for delta in deltas:
            if delta.index not in calls:
                assert delta.call_id is not None
                assert delta.name is not None
                calls[delta.index] = {"name": delta.name, "arguments": ""}
            else:
                assert delta.call_id is None
                assert delta.name is None
            calls[delta.index]["arguments"] += delta.arguments
    assert list(calls) == list(range(len(calls)))
    return content, [(call["name"], call["arguments"]) for call in calls.values()]


def arguments_of(text: str) -> str:
    """The arguments as they stand in the object."""
    return text[text.index('"arguments": ') + 13 : -1]


CASES: list[tuple[CallFormat, str, str, list[str]]] = [
    ("hermes", "Only text, with < and <tool.", "Only text, with < and <tool.", []),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", [WEATHER]),
    ("hermes", f"Let me see.\n<tool_call>\n{WEATHER}\n</tool_call>\n", "Let me see.", [WEATHER]),
    ("hermes", f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{ADD}\n</tool_call>", "", [WEATHER, ADD]),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>\nDone.", "\nDone.", [WEATHER]),
    ("hermes", f"<tool_call>\n{WEATHER}", "", [WEATHER]),
    ("hermes", "<tool_call>\nnonsense</tool_call>", "<tool_call>\nnonsense</tool_call>", []),
    ("hermes", '<tool_call>\n{"name": "rob", "arguments": {}}\n</tool_call>',
     '<tool_call>\n{"name": "rob", "arguments": {}}\n</tool_call>', []),
    ("hermes", '<tool_call>\n{"name": "add"', '<tool_call>\n{"name": "add"', []),
    ("llama3_json", "Only text.", "Only text.", []),
    ("llama3_json", WEATHER, "", [WEATHER]),
    ("llama3_json", f"{WEATHER}; {ADD}", "", [WEATHER, ADD]),
    ("llama3_json", '{"answer": {"name": 4}} and more', '{"answer": {"name": 4}} and more', []),
    ("llama3_json", 'Text {"name": "add", "arguments": {}}', 'Text {"name": "add", "arguments": {}}', []),
    ("json_list", f"[{WEATHER}]", "", [WEATHER]),
    ("json_list", f"[ {WEATHER} ,\n{ADD} ]\n", "", [WEATHER, ADD]),
]  # fmt: skip


@pytest.mark.parametrize(("call_format", "text", "content", "calls"), CASES)
def test_calls_are_taken_out_of_the_text_however_it_is_cut(
    call_format: CallFormat, text: str, content: str, calls: list[str]
) -> None:
    expected = content, [(json.loads(call)["name"], arguments_of(call)) for call in calls]
    assert read(text, call_format) == expected
    for step in (1, 2, 3, 5):
        assert read(text, call_format, list(range(step, len(text), step))) == expected
    for cuts in ([place] for place in range(1, len(text))):
        assert read(text, call_format, cuts) == expected


def test_arguments_are_sent_while_they_are_written() -> None:
    stream = CallStream("hermes", NAMES)
    assert stream.push('<tool_call>\n{"name": "weather"', is_last=False) == ("", [])
    content, (first,) = stream.push(', "arguments": {"city": "Os', is_last=False)
    assert (content, first.name, first.arguments) == ("", "weather", '{"city": "Os')
    _, (second,) = stream.push("lo", is_last=False)
    assert (second.index, second.name, second.arguments) == (0, None, "lo")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "add", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"parameters": {"a": 1}, "name": "add"}', '{"a": 1}'),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "add"}', "{}"),
        ('{"name": "add", "parameters": null}', "{}"),
    ],
)
def test_an_object_in_another_order_is_a_call_all_the_same(text: str, arguments: str) -> None:
    assert read(text, "llama3_json") == ("", [("add", arguments)])
    assert read(text, "llama3_json", list(range(1, len(text)))) == ("", [("add", arguments)])


def test_one_call_is_all_when_they_may_not_be_parallel() -> None:
    assert read(f"[{ADD}, {WEATHER}]", "json_list", max_calls=1) == ("", [("add", arguments_of(ADD))])
    half = WEATHER[:30]
    assert read(f"{ADD}; {half}", "llama3_json", max_calls=1) == ("", [("add", arguments_of(ADD))])


def test_an_answer_that_is_cut_off_in_its_arguments_keeps_what_there_is() -> None:
    assert read('<tool_call>\n{"name": "add", "arguments": {"a": 1', "hermes") == ("", [("add", '{"a": 1')])
