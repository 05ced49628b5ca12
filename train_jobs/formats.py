"""The five ways in which people write training data, each turned into dialogues or plain texts.

Told apart by their fields, as LLaMA-Factory, Axolotl and OpenAI's own files have them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json, JsonValue, model_validator

PLAIN_TEXT = "plain text"
"""The format of texts for continued pre-training."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    speaker: Literal["system", "human", "user", "gpt", "assistant", "observation", "tool"] = Field(alias="from")
    value: str
    weight: Literal[0, 1] | None = None


class _ShareGpt(BaseModel):
    conversations: list[_Turn]
    system: str | None = None
    tools: Json[list[dict[str, JsonValue]]] | list[dict[str, JsonValue]] | None = None
    answer_contains: str | None = None

    def canonical(self) -> dict[str, Any]:
        """Return the record in OpenAI's terms."""
        turns = [
            {"role": SHAREGPT_ROLES[turn.speaker], "content": turn.value}
            | ({} if turn.weight is None else {"weight": turn.weight})
            for turn in self.conversations
        ]
        return _dialogue(self.system, turns, tools=self.tools, answer_contains=self.answer_contains)


class _Alpaca(BaseModel):
    instruction: str
    input: str | None = None
    output: str
    system: str | None = None
    history: list[tuple[str, str]] = []
    answer_contains: str | None = None

    def canonical(self) -> dict[str, Any]:
        """Return the record in OpenAI's terms: the input follows the instruction after a line break."""
        question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        pairs = [*self.history, (question, self.output)]
        turns = [turn for asked, said in pairs for turn in (_turn("user", asked), _turn("assistant", said))]
        return _dialogue(self.system, turns, answer_contains=self.answer_contains)


class _PromptCompletion(BaseModel):
    prompt: str | list[dict[str, JsonValue]]
    completion: str | list[dict[str, JsonValue]]
    answer_contains: str | None = None

    @model_validator(mode="after")
    def _same_kind(self) -> "_PromptCompletion":
        if isinstance(self.prompt, str) != isinstance(self.completion, str):
            raise ValueError("prompt and completion must both be texts or both be lists of messages")
        return self

    def canonical(self) -> dict[str, Any]:
        """Return the record in OpenAI's terms: the prompt is the user's turn, the completion the answer to it."""
        asked = [_turn("user", self.prompt)] if isinstance(self.prompt, str) else self.prompt
        said = [_turn("assistant", self.completion)] if isinstance(self.completion, str) else self.completion
        # What the prompt holds is given, whoever said it.
        asked = [turn | {"weight": 0} if turn.get("role") == "assistant" else turn for turn in asked]
        return _dialogue(None, [*asked, *said], answer_contains=self.answer_contains)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _dialogue(system: str | None, turns: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
    messages = [_turn("system", system), *turns] if system else turns
    return {"messages": messages} | {name: value for name, value in further.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way of writing training data."""

    name: str
    fields: frozenset[str]
    """A record that has all of these is in this format."""
    canonical: Callable[[dict[str, Any]], dict[str, Any]]
    """Returns the record as `messages` or `text`; raises pydantic's `ValidationError`."""


FORMATS = (
    Format(name="OpenAI messages", fields=frozenset({"messages"}), canonical=dict),
    Format(
        name="ShareGPT",
        fields=frozenset({"conversations"}),
        canonical=lambda fields: _ShareGpt.model_validate(fields).canonical(),
    ),
    Format(
        name="Alpaca",
        fields=frozenset({"instruction", "output"}),
        canonical=lambda fields: _Alpaca.model_validate(fields).canonical(),
    ),
    Format(
        name="prompt and completion",
        fields=frozenset({"prompt", "completion"}),
        canonical=lambda fields: _PromptCompletion.model_validate(fields).canonical(),
    ),
    Format(name=PLAIN_TEXT, fields=frozenset({"text"}), canonical=dict),
)
"""The first one whose fields a record has is its format."""


def format_of(fields: dict[str, Any]) -> Format | None:
    """Return the format of a record with `fields`, or None."""
    return next((format_ for format_ in FORMATS if format_.fields <= fields.keys()), None)


def format_named(name: str) -> Format:
    """Return the format called `name`."""
    return next(format_ for format_ in FORMATS if format_.name == name)


def known_formats() -> str:
    """Return what a record may look like, for an error message."""
    return "; ".join(f"{', '.join(sorted(format_.fields))} ({format_.name})" for format_ in FORMATS)
