"""One training example: a dialogue in OpenAI's terms, or a plain text."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json, JsonValue, field_validator, model_validator

TrainOn = Literal["all", "last"]
"""Which answers of a dialogue are trained: all of them, or the last alone."""
Tool = dict[str, JsonValue]


class _Part(BaseModel):
    """A part of a message. A key that is not known here could change what is trained, so it is refused.

    What is null is not there: tables have a cell for each key of any row, and clients write all the keys they know.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class _Function(_Part):
    name: str = Field(min_length=1)
    arguments: Json[dict[str, JsonValue]] | dict[str, JsonValue]
    """Templates want the object; OpenAI's files hold it as text."""


class _ToolCall(_Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _TextPart(_Part):
    type: Literal["text"]
    text: str


class Message(_Part):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: tuple[_ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: Literal[0, 1] | None = None
    """0 leaves this answer out of the loss, as in OpenAI's files."""

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if isinstance(content, list):
            return "".join(_TextPart.model_validate(part).text for part in content)
        return content

    @field_validator("content")
    @classmethod
    def _is_whole(cls, content: str) -> str:
        return _whole(content)

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.role == "assistant":
            wrong = {"name", "tool_call_id"}
        else:
            wrong = {"tool_calls", "weight"} | (set() if self.role == "tool" else {"tool_call_id"})
        given = {field for field in wrong & self.model_fields_set if getattr(self, field)}
        if given:
            raise ValueError(f"a message of role {self.role} has no {min(given)}")
        if not self.content.strip() and not self.tool_calls:
            raise ValueError("content is blank")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            fields["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        further = {"name": self.name, "tool_call_id": self.tool_call_id}
        return fields | {key: value for key, value in further.items() if value is not None}


def _whole(text: str) -> str:
    """Return `text`, which can be encoded."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has half a character (a lone surrogate)")
    return text


class Example(BaseModel):
    """One record in OpenAI's terms; keys beside these belong to whoever wrote the file."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    text: str | None = None
    answer_contains: str | None = Field(default=None, min_length=1)

    @field_validator("text")
    @classmethod
    def _is_whole(cls, text: str | None) -> str | None:
        return None if text is None else _whole(text)

    @model_validator(mode="after")
    def _can_be_trained(self) -> "Example":
        if self.text is not None:
            if not self.text.strip():
                raise ValueError("text is blank")
            return self
        roles = [message.role for message in self.messages]
        if not roles:
            is_text = "messages" not in self.model_fields_set
            raise ValueError("text is null, not a text" if is_text else "messages is empty")
        if "system" in roles[1:]:
            raise ValueError("messages: only the first may have the role system")
        answers = [message for message in self.messages if message.role == "assistant"]
        if not answers:
            raise ValueError("messages: none has the role assistant, so there is no token to train on")
        if all(answer.weight == 0 for answer in answers):
            raise ValueError("messages: every answer has the weight 0, so there is no token to train on")
        for index, message in enumerate(self.messages):
            if message.role == "tool" and not any(m.tool_calls for m in self.messages[:index]):
                raise ValueError(f"messages.{index}: is the result of a tool, and nobody called one before")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """A dialogue and where it stands."""

    where: str
    """File and line, item or row."""
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    answer_contains: str | None = None
    """What the last answer must contain to count as right; only evaluation looks at it."""

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates take them."""
        return [message.as_dict() for message in self.messages]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A plain text for continued pre-training; every token of it is trained."""

    where: str
    text: str
