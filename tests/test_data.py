"""Training data, good and bad, in every format and kind of file."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

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


def parquet_of(folder: Path, **columns: list[object]) -> Path:
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


def test_what_is_null_is_not_there(tmp_path: Path) -> None:
    question = {"role": "user", "content": "a", "tool_calls": None, "name": None, "refusal": None}
    call = {"id": None, "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "audio": None}
    (found,) = dialogues(written(tmp_path, json.dumps({"messages": [question, answer], "tools": []})))
    assert said(found) == [("user", "a"), ("assistant", "")]
    assert found.messages[1].tool_calls[0].function.name == "f"
    # Parquet has a cell for every key of any turn
    (same,) = dialogues(parquet_of(tmp_path, messages=[[question, answer]]))
    assert same.messages == found.messages


def test_a_line_may_be_long(tmp_path: Path) -> None:
    text = "猫" * 3_000_000
    assert said(dialogues(written(tmp_path, turns(("user", text), ("assistant", "b"))))[0])[0] == ("user", text)


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
