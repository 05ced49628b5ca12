"""Chat data as it lies in a file: JSON Lines, one dialogue a line, in OpenAI's `messages` format."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster.errors import UserError

HELD_OUT_SHARE = 0.1
"""Share of the dialogues that is held out where the user brings no evaluation file."""


class DataError(UserError, ValueError):
    """A data file that cannot be trained on; the text names file, line and reason."""


class Message(BaseModel):
    """One turn. Further keys (tool calls, names, weights) would change what is trained, so they are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: str) -> str:
        if not content.strip():
            raise ValueError("is blank")
        return content


class _Line(BaseModel):
    """One line of the file; keys beside these two belong to whoever wrote the file."""

    messages: list[Message] = Field(min_length=1)
    answer_contains: str | None = Field(default=None, min_length=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """One dialogue and where it stands."""

    line: int
    """Counts from 1."""
    messages: tuple[Message, ...]
    answer_contains: str | None
    """What the last answer must contain to count as right; only evaluation looks at it."""

    def as_dicts(self) -> list[dict[str, str]]:
        """Return the messages as chat templates take them."""
        return [message.model_dump() for message in self.messages]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """The dialogues of one file, in order."""

    path: Path
    sha256: str
    dialogues: tuple[Dialogue, ...]


def read_dialogues(path: Path) -> DataFile:
    """Return the dialogues in `path`; blank lines are skipped.

    Raises:
        DataError: The file cannot be read, is empty, or has lines that are no dialogue; the first of them is named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}).") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    dialogues: list[Dialogue] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            dialogues.append(_parse(number, line))
        except ValueError as error:
            problems.append(f"{path}:{number}: {_reason(error)}")
    if problems:
        more = f" ({len(problems) - 1} more lines are wrong)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    if not dialogues:
        raise DataError(f'{path}: no dialogue in it; every line must be {{"messages": [...]}}.')
    return DataFile(path=path, sha256=hashlib.sha256(content).hexdigest(), dialogues=tuple(dialogues))


def _parse(number: int, line: bytes) -> Dialogue:
    parsed = _Line.model_validate_json(line.decode("utf-8"))
    roles = [message.role for message in parsed.messages]
    if "system" in roles[1:]:
        raise ValueError("messages: only the first may have the role system")
    if "assistant" not in roles:
        raise ValueError("messages: none has the role assistant, so there is no token to train on")
    return Dialogue(line=number, messages=tuple(parsed.messages), answer_contains=parsed.answer_contains)


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        return f"{where}: {text}" if where else text
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    return str(error)


def split_held_out(dialogues: Sequence[Dialogue], *, seed: int) -> tuple[tuple[Dialogue, ...], tuple[Dialogue, ...]]:
    """Return the dialogues to train on and those to hold out (a tenth, at least one), each in the file's order.

    Raises:
        DataError: One dialogue alone cannot be split.
    """
    if len(dialogues) < 2:
        raise DataError("One dialogue cannot be split into training and evaluation; add more, or give --eval-data.")
    number = max(1, round(len(dialogues) * HELD_OUT_SHARE))
    held_out = set(random.Random(seed).sample(range(len(dialogues)), number))  # noqa: S311 -- a split, not a secret
    train = tuple(d for i, d in enumerate(dialogues) if i not in held_out)
    return train, tuple(dialogues[i] for i in sorted(held_out))
