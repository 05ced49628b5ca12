"""Training data, good and bad, in every format and kind of file."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from cluster.errors import UserError
from train_jobs.data import examples_at, held_out_examples, read_data_file
from train_jobs.messages import Dialogue, Document
from train_jobs.records import DataError

TURNS = [("user", "猫は？"), ("assistant", "ヒバナです。")]
OPENAI = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
GOOD = json.dumps(OPENAI, ensure_ascii=False)


def written(folder: Path, content: str | bytes, name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def dialogues(path: Path) -> list[Dialogue]:
    examples = read_data_file(path).examples
    assert all(isinstance(example, Dialogue) for example in examples)
    return [example for example in examples if isinstance(example, Dialogue)]


def said(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in dialogue.messages]


def test_dialogues_come_in_order_with_their_lines_and_foreign_keys_are_no_problem(tmp_path: Path) -> None:
    second = '{"id": 7, "messages": [{"role": "assistant", "content": "hi"}], "answer_contains": "hi"}'
    path = written(tmp_path, f"\ufeff{GOOD}\r\n\n  \n{second}")
    found = dialogues(path)
    assert [d.where for d in found] == [f"{path}:1", f"{path}:4"]
    assert said(found[0]) == TURNS
    assert [d.answer_contains for d in found] == [None, "hi"]


def test_the_shipped_data_is_read_whole() -> None:
    folder = Path(__file__).parent.parent / "examples" / "tsuchineya_faq"
    train, held_out = (dialogues(folder / name) for name in ("train.jsonl", "heldout.jsonl"))
    assert (len(train), len(held_out)) == (184, 48)  # as its README counts them
    assert all(d.answer_contains for d in held_out)


FORMATS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "OpenAI messages": (OPENAI, TURNS),
    "ShareGPT": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "Alpaca": (
        {"instruction": "訳して", "input": "cat", "output": "猫", "history": [["x", "y"]]},
        [("user", "x"), ("assistant", "y"), ("user", "訳して\ncat"), ("assistant", "猫")],
    ),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognized_and_becomes_the_same_dialogue(name: str, tmp_path: Path) -> None:
    record, expected = FORMATS[name]
    file = read_data_file(written(tmp_path, json.dumps(record)))
    assert file.format == name
    (dialogue,) = file.examples
    assert isinstance(dialogue, Dialogue)
    assert said(dialogue) == expected


def test_a_prompt_of_messages_is_given_and_its_completion_trained(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    record = {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]}
    (dialogue,) = dialogues(written(tmp_path, json.dumps(record)))
    assert [message.weight for message in dialogue.messages] == [None, 0, None, None]


def test_texts_for_further_pre_training(tmp_path: Path) -> None:
    for path in (written(tmp_path, '{"text": "吾輩は猫である。"}'), written(tmp_path, "吾輩は猫である。", "cat.txt")):
        file = read_data_file(path)
        assert file.format == "plain text"
        (document,) = file.examples
        assert isinstance(document, Document)
        assert document.text == "吾輩は猫である。"


def test_all_kinds_of_file_hold_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": f'猫 {i}\nと "犬"', "completion": f"答え, {i}"} for i in range(3)]
    expected = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in rows]
    lines = written(tmp_path, "".join(f"{json.dumps(row)}\n" for row in rows), "a.jsonl")
    array = written(tmp_path, json.dumps(rows, indent=1), "a.json")
    named_json = written(tmp_path, lines.read_bytes(), "b.json")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tables = {"a.csv": ",", "a.tsv": "\t"}
    for name, delimiter in tables.items():
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    for path in (lines, array, named_json, tmp_path / "a.parquet", *(tmp_path / name for name in tables)):
        assert [said(dialogue) for dialogue in dialogues(path)] == expected, path


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


BAD = {
    "not JSON": ("{messages: 1}", "not JSON"),
    "cut off": (GOOD[:40], "not JSON"),
    "an array": ("[1, 2]", "is list, not an object"),
    "a number": ("3", "is int, not an object"),
    "NaN": ('{"messages": NaN}', "NaN is not JSON"),
    "a key twice": ('{"messages": [], "messages": []}', "has 'messages' twice"),
    "unknown fields": ('{"question": "x", "answer": "y"}', "has the fields question, answer; known are .*OpenAI"),
    "no fields": ("{}", "has the fields none"),
    "another format": (
        '{"prompt": "x", "completion": "y"}',
        "is in the format prompt and completion, and those before",
    ),
    "messages is text": ('{"messages": "x"}', "messages: "),
    "no turn": ('{"messages": []}', "messages is empty"),
    "a turn is text": ('{"messages": ["x"]}', "messages.0: "),
    "unknown role": (turns(("human", "x")), "messages.0.role: .*'assistant'"),
    "missing role": ('{"messages": [{"content": "x"}]}', "messages.0.role: Field required"),
    "missing content": ('{"messages": [{"role": "user"}]}', "messages.0: content is blank"),
    "content is null": (turns(("user", None)), "messages.0: content is blank"),
    "content is a number": (turns(("user", 3)), "messages.0.content: "),
    "content is a picture": (turns(("user", [{"type": "image_url", "image_url": "x"}])), "messages.0.content"),
    "blank content": (turns(("user", "hi"), ("assistant", " \n")), "messages.1: content is blank"),
    "blank in Japanese": (turns(("user", "hi"), ("assistant", "\u3000")), "messages.1: content is blank"),
    "half a character": (turns(("user", "\ud83d"), ("assistant", "x")), "messages.0.content: has half a character"),
    "an unknown key": ('{"messages": [{"role": "user", "content": "x", "mood": 1}]}', "messages.0.mood: "),
    "a user who calls a tool": (
        '{"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}'
        "]}",
        "messages.0: a message of role user has no tool_calls",
    ),
    "arguments that are no JSON": (
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
        "messages.0.tool_calls.0.function.arguments",
    ),
    "a result without a call": (turns(("user", "x"), ("tool", "3"), ("assistant", "y")), "messages.1: is the result"),
    "a weight of 2": ('{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}', "messages.0.weight: "),
    "only weights of 0": (
        '{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}',
        "every answer has the weight 0",
    ),
    "late system": (turns(("user", "x"), ("system", "y"), ("assistant", "z")), "only the first"),
    "nothing to train on": (turns(("user", "x")), "none has the role assistant"),
    "empty expectation": (GOOD[:-1] + ', "answer_contains": ""}', "answer_contains: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_one_line_with_file_line_and_reason(name: str, tmp_path: Path) -> None:
    line, reason = BAD[name]
    path = written(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=reason) as caught:
        read_data_file(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ")
    assert text.endswith("(1 more records are wrong)")
    assert "\n" not in text
    assert isinstance(caught.value, UserError)


IN_THEIR_FORMAT = {
    "a speaker that is unknown": ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations.0.from: "),
    "a turn without words": ({"conversations": [{"from": "gpt"}]}, "conversations.0.value: Field required"),
    "tools that are no JSON": ({"conversations": [], "tools": "["}, "tools"),
    "an output that is a list": ({"instruction": "x", "output": ["y"]}, "output: "),
    "a history of single texts": ({"instruction": "x", "output": "y", "history": ["a"]}, "history.0: "),
    "a prompt of another kind": ({"prompt": "x", "completion": []}, "both be texts or both be lists"),
    "a blank text": ({"text": " "}, "text is blank"),
}


@pytest.mark.parametrize("name", IN_THEIR_FORMAT)
def test_a_fault_is_named_in_the_words_of_the_format(name: str, tmp_path: Path) -> None:
    record, reason = IN_THEIR_FORMAT[name]
    path = written(tmp_path, json.dumps(record))
    with pytest.raises(DataError, match=reason) as caught:
        read_data_file(path)
    assert str(caught.value).startswith(f"{path}:1: ")


def _unreadable_parquet(folder: Path) -> Path:
    return written(folder, "PAR1 not really", "a.parquet")


def _latin_1(folder: Path) -> Path:
    return written(folder, "prompt,completion\na,b\ncaf\u00e9,c\n".encode("latin-1"), "a.csv")


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda folder: written(folder, "\n \n"), "there is nothing in it"),
    "absent": (lambda folder: folder / "absent.jsonl", "No such file"),
    "a folder": (lambda folder: folder, "no reader for ''"),
    "a picture": (lambda folder: written(folder, b"\x89PNG", "a.png"), "no reader for '.png'; use one of .csv"),
    "JSON that is cut off": (lambda folder: written(folder, f"[{GOOD},", "a.json"), "not JSON"),
    "JSON of texts": (lambda folder: written(folder, '["x"]', "a.json"), "item 1: is str, not an object"),
    "no Parquet": (_unreadable_parquet, "not a Parquet file"),
    "a table in Latin-1": (_latin_1, "a.csv:3: not UTF-8"),
    "a table in UTF-16": (lambda f: written(f, "prompt,completion\na,b".encode("utf-16"), "a.csv"), "UTF-8"),
    "a row too long": (lambda f: written(f, "prompt,completion\na,b,c\n", "a.csv"), "a.csv:2: has more cells"),
    "a row too short": (lambda f: written(f, "prompt,completion\na\n", "a.csv"), "a.csv:2: has fewer cells"),
    "an open quote": (lambda f: written(f, 'prompt,completion\na,b\n"a,b\n', "a.csv"), "a.csv:3: not a table"),
    "a text in Shift JIS": (lambda f: written(f, "吾輩は猫".encode("shift-jis"), "a.txt"), "a.txt:1: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    make, reason = BAD_FILES[name]
    with pytest.raises(DataError, match=reason) as caught:
        read_data_file(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: not UTF-8 \(byte 41\)"):
        read_data_file(written(tmp_path, GOOD[:40].encode() + b"\x83n"))


def test_examples_are_found_by_their_number(tmp_path: Path) -> None:
    source = written(tmp_path, f"{GOOD}\n\n" * 4 + "{\n")
    assert [example.where for example in examples_at(source, [3, 1])] == [f"{source}:3", f"{source}:7"]
    with pytest.raises(DataError, match=":9: not JSON"):
        examples_at(source, range(1000))


def test_a_tenth_is_held_out_by_seed_and_a_thousand_at_most() -> None:
    held_out = held_out_examples(30, seed=1)
    assert len(held_out) == len(set(held_out)) == 3
    assert held_out == sorted(held_out)
    assert set(held_out) <= set(range(30))
    assert held_out_examples(30, seed=1) == held_out
    assert held_out_examples(30, seed=2) != held_out
    assert len(held_out_examples(2, seed=0)) == 1
    assert len(held_out_examples(1_000_000, seed=0)) == 1000
    with pytest.raises(DataError, match="--eval-data"):
        held_out_examples(1, seed=0)
