"""Broken data files: each is one line that names the file, the place in it and the reason."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from test_data import GOOD, OPENAI, parquet_of, turns, written

from cluster.errors import UserError
from train_jobs.data import read_data_file
from train_jobs.records import DataError

BAD = {
    "not JSON": ("{messages: 1}", "not JSON"),
    "cut off": (GOOD[:40], "not JSON"),
    "an array": ("[1, 2]", "is list, not an object"),
    "a number": ("3", "is int, not an object"),
    "NaN": ('{"messages": NaN}', "NaN is not JSON"),
    "Infinity": ('{"messages": [], "score": Infinity}', "Infinity is not JSON"),
    "two on a line": (GOOD + GOOD, "not JSON: more follows the record"),
    "a comma behind it": (f"{GOOD},", "not JSON: more follows the record"),
    "quoted as Python does": (str(OPENAI), "not JSON: Expecting property name"),
    "an escape that is none": (GOOD.replace("猫", "\\x41"), "not JSON: Invalid .*escape"),
    "another mark of byte order": (f"\ufeff{GOOD}", "not JSON: Unexpected UTF-8 BOM"),
    "too deep": ('{"messages": ' + "[" * 100_000, "inside each other, too many"),
    "a name of two lines": ('{"one\\ntwo": 1}', r"has the fields one\\ntwo; known are"),
    "half a character in a name": ('{"\\ud83d": 1}', r"has the fields \\ud83d; known are"),
    "many long names": (
        json.dumps({f"{i}{'x' * 50}": i for i in range(9)}),
        f"has the fields 0{'x' * 39}…, .*, 7{'x' * 39}…, …; known are",
    ),
    "a key twice": ('{"messages": [], "messages": []}', "has 'messages' twice"),
    "unknown fields": ('{"question": "x", "answer": "y"}', "has the fields question, answer; known are .*OpenAI"),
    "no fields": ("{}", "has the fields none"),
    "another format": (
        '{"prompt": "x", "completion": "y"}',
        "is in the format prompt and completion, and those before",
    ),
    "messages is text": ('{"messages": "x"}', "messages: is str, not a list"),
    "messages is null": ('{"messages": null}', "messages: is null, not a list"),
    "no turn": ('{"messages": []}', "messages is empty"),
    "a turn is text": ('{"messages": ["x"]}', "messages.0: is str, not an object"),
    "a turn is null": ('{"messages": [null]}', "messages.0: is null, not an object"),
    "unknown role": (turns(("human", "x")), "messages.0.role: .*'assistant'"),
    "missing role": ('{"messages": [{"content": "x"}]}', "messages.0.role: Field required"),
    "missing content": ('{"messages": [{"role": "user"}]}', "messages.0: content is blank"),
    "content is null": (turns(("user", None)), "messages.0: content is blank"),
    "content is a number": (turns(("user", 3)), "messages.0.content: is int, not a text"),
    "tools is an object": (GOOD[:-1] + ', "tools": {"name": "f"}}', "tools: is dict, not a list"),
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
    "a text that is null": ({"text": None}, "text is null"),
    "a text that is a list": ({"text": ["x"]}, "text: is list, not a text"),
    "half a character in a text": ({"text": "\ud83d"}, "text: has half a character"),
    "an instruction that is a number": ({"instruction": 3, "output": "x"}, "instruction: is int, not a text"),
}


@pytest.mark.parametrize("name", IN_THEIR_FORMAT)
def test_a_fault_is_named_in_the_words_of_the_format(name: str, tmp_path: Path) -> None:
    record, reason = IN_THEIR_FORMAT[name]
    path = written(tmp_path, json.dumps(record))
    with pytest.raises(DataError, match=reason) as caught:
        read_data_file(path)
    assert str(caught.value).startswith(f"{path}:1: ")


def _cut_parquet(folder: Path) -> Path:
    return written(folder, parquet_of(folder, text=["a"]).read_bytes()[:-20], "a.parquet")


def _damaged_parquet(folder: Path) -> Path:
    content = bytearray(parquet_of(folder, text=[str(i) * 50 for i in range(1000)]).read_bytes())
    content[100:300] = bytes(200)
    return written(folder, bytes(content), "a.parquet")


def _folder_with_a_suffix(folder: Path) -> Path:
    (folder / "a.jsonl").mkdir()
    return folder / "a.jsonl"


def _latin_1(folder: Path) -> Path:
    return written(folder, "prompt,completion\na,b\ncaf\u00e9,c\n".encode("latin-1"), "a.csv")


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda folder: written(folder, "\n \n"), "there is nothing in it"),
    "absent": (lambda folder: folder / "absent.jsonl", "No such file"),
    "a folder": (lambda folder: folder, "no reader for ''"),
    "a picture": (lambda folder: written(folder, b"\x89PNG", "a.png"), "no reader for '.png'; use one of .csv"),
    "JSON that is cut off": (lambda folder: written(folder, f"[{GOOD},", "a.json"), "not JSON"),
    "JSON of texts": (lambda folder: written(folder, '["x"]', "a.json"), "item 1: is str, not an object"),
    "JSON without a comma": (lambda f: written(f, f"[{GOOD}\n{GOOD}]", "a.json"), "item 1: not JSON: Expecting ','"),
    "JSON with a key twice": (lambda f: written(f, f'[{GOOD}, {{"text": "a", "text": "b"}}]', "a.json"), "item 2: has"),
    "JSON that is too deep": (lambda f: written(f, "[" * 100_000, "a.json"), "item 1: .*inside each other"),
    "JSON in Latin-1": (lambda f: written(f, b'[\n{"text": "caf\xe9"}]', "a.json"), "a.json:2: not UTF-8"),
    "an empty array": (lambda folder: written(folder, "[]", "a.json"), "there is nothing in it"),
    "records under a name": (lambda f: written(f, f'{{"data": [{GOOD}]}}', "a.json"), "a.json:1: has the fields data"),
    "lines that end in CR alone": (lambda f: written(f, f"{GOOD}\r{GOOD}\r"), "chats.jsonl:1: not JSON: more follows"),
    "JSON Lines in UTF-16": (lambda f: written(f, GOOD.encode("utf-16")), "chats.jsonl:1: not UTF-8"),
    "indented JSON Lines": (lambda f: written(f, json.dumps(OPENAI, indent=1)), "chats.jsonl:1: not JSON"),
    "a compressed file": (lambda f: written(f, gzip.compress(GOOD.encode()), "a.jsonl.gz"), "no reader for '.gz'"),
    "a compressed file that hides it": (lambda f: written(f, gzip.compress(b"x")), "chats.jsonl:1: not UTF-8"),
    "a web page": (lambda f: written(f, "<!DOCTYPE html>\n<html>"), "chats.jsonl:1: not JSON: Expecting value"),
    "a folder called as a file": (_folder_with_a_suffix, "Is a directory"),
    "no Parquet": (lambda f: written(f, "PAR1 not really", "a.parquet"), "not a Parquet file"),
    "Parquet that is cut off": (_cut_parquet, "not a Parquet file"),
    "damaged Parquet": (_damaged_parquet, "cannot read it"),
    "Parquet without rows": (lambda f: parquet_of(f, text=[]), "there is nothing in it"),
    "Parquet of other columns": (lambda f: parquet_of(f, q=["a"], a=["b"]), "row 1: has the fields q, a; known are"),
    "Parquet of numbers": (lambda f: parquet_of(f, text=[1]), "row 1: text: is int"),
    "Parquet of bytes": (lambda f: parquet_of(f, text=[b"\xff"]), "row 1: text: "),
    "a null cell": (
        lambda f: parquet_of(f, prompt=["a", None], completion=["b", "c"]),
        "row 2: has the fields completion; known are",
    ),
    "a null turn": (
        lambda f: parquet_of(f, messages=[[{"role": "assistant", "content": "a"}], [None]]),
        "row 2: messages.0: is null, not an object",
    ),
    "a role that is null": (
        lambda f: parquet_of(f, messages=[[{"role": "user", "content": "a"}, {"role": None, "content": "b"}]]),
        "row 1: messages.1.role: Field required",
    ),
    "a table with a column twice": (lambda f: written(f, "text,text\na,b\n", "a.csv"), "a.csv:1: .* 'text' twice"),
    "a table of semicolons": (
        lambda f: written(f, "prompt;completion\na;b\n", "a.csv"),
        "a.csv:2: has the fields prompt;c",
    ),
    "a table without a header": (lambda f: written(f, "Hi?,Hello.\nHo?,Yes.\n", "a.csv"), "a.csv:2: has the fields Hi"),
    "a table of nothing but a header": (lambda f: written(f, "prompt,completion\n", "a.csv"), "there is nothing in it"),
    "an empty cell": (lambda f: written(f, "prompt,completion\na,b\na,\n", "a.csv"), "a.csv:3: has the fields prompt;"),
    "a blank text": (lambda folder: written(folder, " \n", "a.txt"), "there is nothing in it"),
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


HUB_ERRORS = {
    "unknown": (
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist\non the Hub"),
        r"doesn't exist\)",
    ),
    "out of reach": (ConnectionError(), "ConnectionError"),
    "without that split": (ValueError('Unknown split "test". Should be one of'), "Unknown split"),
    "of several parts": (ValueError("Config name is missing.\nPlease pick one"), r"Config name is missing\.\)"),
}


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_a_data_set_that_the_hub_does_not_give_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, reason = HUB_ERRORS[name]

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=reason) as caught:
        read_data_file("hf:a/b@test")
    assert str(caught.value).startswith("hf:a/b@test: cannot be loaded (")
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_has_a_name() -> None:
    with pytest.raises(DataError, match=r"hf:: names no data set; give it as hf:org/name, or hf:org/name@split\."):
        read_data_file("hf:")


def test_a_row_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([json.loads(GOOD), {"messages": []}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("a/b", "train"): rows}[name, split])
    with pytest.raises(DataError, match=r"^hf:a/b: row 2: messages is empty$"):
        read_data_file("hf:a/b")


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: not UTF-8 \(byte 41\)"):
        read_data_file(written(tmp_path, GOOD[:40].encode() + b"\x83n"))
