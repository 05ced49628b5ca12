"""What a data set holds and what is wrong with it."""

import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from tiny_models import byte_tokenizer, tiny_llama_folder
from typer.testing import CliRunner

from cluster.catalog import find
from train_jobs import data_command
from train_jobs.data_check import Report, check_data
from train_jobs.text_faults import FAULTS, Fault


def turn(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def report_of(folder: Path, *records: dict[str, object], max_length: int = 500) -> Report:
    path = folder / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return check_data(path, byte_tokenizer(), max_length=max_length)


def test_a_clean_file_is_counted_and_shown(tmp_path: Path) -> None:
    report = report_of(tmp_path, turn("ab", "cde"), turn("f", "gh"))
    assert (report.format, report.num_records, report.num_samples) == ("OpenAI messages", 2, 2)
    # answers of 3 and 2 bytes, each with its end-of-turn token
    assert report.num_trained_tokens == 3 + 2 + 2
    assert not report.findings
    assert not report.has_errors
    assert [(span.text, span.is_trained) for span in report.previews[0]] == [
        ("<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n", False),
        ("cde<|im_end|>", True),
        ("\n", False),
    ]


TEXTS = {
    "replacement characters": ("caf\ufffd", "café"),
    "mojibake": ("日本語".encode().decode("cp1252"), "naïve façade"),
    "control characters": ("a\x07b", "a\tb\n"),
    "invisible characters": ("a\u200bb", "a b"),
    "half-width katakana": ("ｶﾀｶﾅ", "カタカナ"),
    "full- and half-width letters or digits in one text": ("１２ and 3", "１２と３"),
    "decomposed characters": ("か\u3099", "が"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_is_found_where_it_is_and_only_there(fault: Fault, tmp_path: Path) -> None:
    assert {fault.name for fault in FAULTS} == set(TEXTS)
    name = fault.name
    bad, good = TEXTS[name]
    report = report_of(tmp_path, turn("q", good), turn(bad, "a"))
    assert list(report.findings) in ([name], [name, "a tokenizer that spells Japanese out in bytes"])
    assert report.findings[name].count == 1
    assert report.findings[name].places == [f"{tmp_path / 'chats.jsonl'}:2"]
    assert not report.has_errors


def test_utf8_that_was_read_as_western_is_mojibake_also_where_the_code_page_has_holes() -> None:
    (mojibake,) = (fault for fault in FAULTS if fault.name == "mojibake")
    assert mojibake.is_in("ひばな".encode().decode("latin-1"))  # browsers read it as 0x81, which cp1252 lacks
    assert not mojibake.is_in("ひばな")


def test_repeats_are_found_whatever_their_width_and_blanks(tmp_path: Path) -> None:
    report = report_of(tmp_path, turn("Ａ  b", "c"), turn("x", "y"), turn("a b", "C"))
    assert report.findings["repeats"].count == 1
    path = tmp_path / "chats.jsonl"
    assert report.findings["repeats"].places == [f"{path}:3 (as {path}:1)"]


def test_cut_and_untrainable_samples_are_told_apart(tmp_path: Path) -> None:
    answer = "a" * 30
    report = report_of(tmp_path, turn("q", answer), turn("q" * 60, answer), turn("q", "a"), max_length=50)
    assert report.findings["samples that are cut"].count == 1
    assert "inside an answer" in report.findings["samples that are cut"].places[0]
    assert report.findings["samples without a trained token"].count == 1
    assert report.has_errors


def test_broken_records_are_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    report = report_of(tmp_path, turn("q", "a"), {"messages": []}, turn("r", "b"))
    assert report.num_samples == 2
    (place,) = report.findings["records that cannot be read"].places
    assert place.endswith("chats.jsonl:2: messages is empty")
    assert report.has_errors


def test_a_narrow_terminal_shows_lines_colours_and_both_ends_of_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_command, "out", Console(width=100, force_terminal=True, color_system="standard"))
    monkeypatch.setattr(data_command, "find", lambda _: find(str(tiny_llama_folder(tmp_path / "tiny"))))
    path = tmp_path / f"{'long' * 20}.jsonl"
    records = [turn("q", "a" * 299 + "b" * 500 + "c" * 295), turn("x", "y"), turn("x", "y"), {}]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    with pytest.raises(typer.Exit):
        data_command.check(str(path), model="tiny")
    said = capsys.readouterr().out
    for text in (
        "line 4: has the",
        "line 3 (as line 2)",
        "\x1b[1;32m" + "a" * 299 + "b … 504 characters … ccc",
        "cc<|im",
    ):
        assert text in said
    assert "⟦" not in said


def test_the_command_prints_it_and_says_by_its_exit_code_whether_it_can_be_trained(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_command, "out", Console(width=200))
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(turn("猫は？", "ヒバナです。")) + "\n{}\n")
    result = CliRunner().invoke(data_command.app, ["check", str(path), "--model", "smollm2-135m-instruct"])
    assert result.exit_code == 1
    assert "records that cannot be read" in result.output
    assert "⟦ヒバナです。<|im_end|>⟧" in result.output
    assert "line 2: has the fields none" in result.output  # also on a narrow terminal, whatever the file is called
    assert "Training refuses it" in result.output
    path.write_text(json.dumps(turn("hi", "ho")) + "\n")
    result = CliRunner().invoke(data_command.app, ["check", str(path), "--model", "smollm2-135m-instruct", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["num_samples"] == 1
