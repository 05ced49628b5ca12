"""Chat data files, good and bad."""

import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from train_jobs.data import DataError, read_dialogues, split_held_out

GOOD = '{"messages": [{"role": "user", "content": "猫は？"}, {"role": "assistant", "content": "ヒバナです。"}]}'


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "chats.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_dialogues_come_in_order_with_their_lines_and_foreign_keys_are_no_problem(tmp_path: Path) -> None:
    second = '{"id": 7, "messages": [{"role": "assistant", "content": "hi"}], "answer_contains": "hi"}'
    file = read_dialogues(written(tmp_path, f"\ufeff{GOOD}\r\n\n  \n{second}"))
    assert [d.line for d in file.dialogues] == [1, 4]
    assert [m.content for m in file.dialogues[0].messages] == ["猫は？", "ヒバナです。"]
    assert [d.answer_contains for d in file.dialogues] == [None, "hi"]


def test_the_shipped_data_is_read_whole() -> None:
    folder = Path(__file__).parent.parent / "examples" / "tsuchineya_faq"
    train, held_out = (read_dialogues(folder / name).dialogues for name in ("train.jsonl", "heldout.jsonl"))
    assert (len(train), len(held_out)) == (184, 48)  # as its README counts them
    assert all(d.answer_contains for d in held_out)


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


BAD = {
    "not JSON": ("{messages: 1}", "JSON"),
    "cut off": (GOOD[:40], "JSON"),
    "an array": ("[1, 2]", "object"),
    "a number": ("3", "object"),
    "no messages": ('{"prompt": "x"}', "messages: Field required"),
    "messages is text": ('{"messages": "x"}', "messages: "),
    "no turn": ('{"messages": []}', "messages: "),
    "a turn is text": ('{"messages": ["x"]}', "messages.0: "),
    "unknown role": (turns(("human", "x")), "messages.0.role: .*'assistant'"),
    "missing role": ('{"messages": [{"content": "x"}]}', "messages.0.role: Field required"),
    "missing content": ('{"messages": [{"role": "user"}]}', "messages.0.content: Field required"),
    "content is null": (turns(("user", None)), "messages.0.content: "),
    "content is a list": (turns(("user", [{"type": "text"}])), "messages.0.content: "),
    "blank content": (turns(("user", "hi"), ("assistant", " \n")), "messages.1.content: is blank"),
    "blank in Japanese": (turns(("user", "hi"), ("assistant", "\u3000")), "messages.1.content: is blank"),
    "tool calls": (
        '{"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}',
        "messages.0.tool_calls: ",
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
        read_dialogues(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ")
    assert text.endswith("(1 more lines are wrong)")
    assert "\n" not in text
    assert isinstance(caught.value, UserError)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: not UTF-8 \(byte 41 of the line\)"):
        read_dialogues(written(tmp_path, GOOD[:40].encode() + b"\x83n"))


def test_files_without_dialogues_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dialogue in it"):
        read_dialogues(written(tmp_path, "\n \n"))
    with pytest.raises(DataError, match="No such file"):
        read_dialogues(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_dialogues(tmp_path)


def test_a_tenth_is_held_out_by_seed(tmp_path: Path) -> None:
    dialogues = read_dialogues(written(tmp_path, f"{GOOD}\n" * 30)).dialogues
    train, held_out = split_held_out(dialogues, seed=1)
    assert (len(train), len(held_out)) == (27, 3)
    assert sorted(d.line for d in (*train, *held_out)) == list(range(1, 31))
    assert split_held_out(dialogues, seed=1) == (train, held_out)
    assert split_held_out(dialogues, seed=2) != (train, held_out)
    assert len(split_held_out(dialogues[:2], seed=0)[1]) == 1
    with pytest.raises(DataError, match="--eval-data"):
        split_held_out(dialogues[:1], seed=0)
