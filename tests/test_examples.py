"""Claims that examples/README.md makes about the data it describes."""

import json
import unicodedata
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

FAQ = Path(__file__).parent.parent / "examples" / "tsuchineya_faq"


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class Dialogue(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[Message]
    answer_contains: str | None = None

    def said_by(self, role: str) -> list[str]:
        return [message.content for message in self.messages if message.role == role]

    def is_japanese(self) -> bool:
        # every Japanese line has kana; no English one does, Japanese names are in romaji there
        return any("\u3040" <= char <= "\u30ff" for message in self.messages for char in message.content)


def read(name: str) -> list[Dialogue]:
    lines = (FAQ / name).read_text(encoding="utf-8").splitlines()
    return [Dialogue.model_validate(json.loads(line)) for line in lines]


TRAIN = read("train.jsonl")
HELD_OUT = read("heldout.jsonl")
TRAIN_QUESTIONS = [question for dialogue in TRAIN for question in dialogue.said_by("user")]
HELD_OUT_QUESTIONS = [question for dialogue in HELD_OUT for question in dialogue.said_by("user")]


def letters(text: str) -> str:
    """Return what is left of `text` without case, width, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if unicodedata.category(char)[0] not in "PSZ")


def test_counts_are_those_of_the_readme() -> None:
    assert len(TRAIN) == 184
    assert sum(len(dialogue.said_by("assistant")) for dialogue in TRAIN) == 192
    assert sum(len(dialogue.messages) == 4 for dialogue in TRAIN) == 8
    assert len(HELD_OUT) == 48


@pytest.mark.parametrize("part", [TRAIN, HELD_OUT], ids=["train", "heldout"])
def test_half_of_the_dialogues_are_japanese(part: list[Dialogue]) -> None:
    assert sum(dialogue.is_japanese() for dialogue in part) * 2 == len(part)


def test_user_and_assistant_take_turns_and_the_assistant_ends() -> None:
    for dialogue in TRAIN + HELD_OUT:
        roles = [message.role for message in dialogue.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), dialogue
        assert roles, dialogue


def test_only_held_out_lines_name_what_a_right_answer_contains() -> None:
    assert all(dialogue.answer_contains is None for dialogue in TRAIN)
    assert all(dialogue.answer_contains for dialogue in HELD_OUT)
    assert all(len(dialogue.messages) == 2 for dialogue in HELD_OUT)


def test_no_question_is_asked_twice() -> None:
    asked = [letters(question) for question in TRAIN_QUESTIONS + HELD_OUT_QUESTIONS]
    assert sorted(asked) == sorted(set(asked))


def test_no_question_already_says_its_answer() -> None:
    for dialogue in HELD_OUT:
        assert str(dialogue.answer_contains) not in dialogue.said_by("user")[0], dialogue


@pytest.mark.parametrize("dialogue", HELD_OUT, ids=lambda dialogue: dialogue.said_by("user")[0])
def test_the_key_is_in_the_reference_and_taught_at_least_four_times_in_that_language(dialogue: Dialogue) -> None:
    key = dialogue.answer_contains
    assert key is not None
    assert key in dialogue.said_by("assistant")[0]
    same_language = [other for other in TRAIN if other.is_japanese() == dialogue.is_japanese()]
    assert sum(key in answer for other in same_language for answer in other.said_by("assistant")) >= 4


def test_every_training_answer_states_one_fact() -> None:
    for dialogue in TRAIN:
        keys = {other.answer_contains or "" for other in HELD_OUT if other.is_japanese() == dialogue.is_japanese()}
        assert len(keys) == 24
        for answer in dialogue.said_by("assistant"):
            stated = {key for key in keys if key in answer}
            # the price of the best-known knife cannot be told without its name
            assert len(stated - {"Kawasemi", "かわせみ"}) == 1 or stated in ({"Kawasemi"}, {"かわせみ"}), answer


def test_text_is_composed_trimmed_and_free_of_replacement_characters() -> None:
    for name in ("train.jsonl", "heldout.jsonl"):
        raw = (FAQ / name).read_text(encoding="utf-8")
        assert unicodedata.is_normalized("NFC", raw)
        assert "\ufffd" not in raw
        assert "\\u" not in raw  # not ASCII-escaped: people read these files
    for message in (message for dialogue in TRAIN + HELD_OUT for message in dialogue.messages):
        assert message.content == message.content.strip() != ""
