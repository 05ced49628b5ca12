"""Training data as it lies in a file or on the hub, read and checked as a whole."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from train_jobs.formats import Format, format_of, known_formats
from train_jobs.messages import Dialogue, Document, Example
from train_jobs.records import HUB_PREFIX, DataError, Record, read_records

HELD_OUT_SHARE = 0.1
"""Share of the examples that is held out where the user brings no evaluation file."""

Item = TypeVar("Item", Dialogue, Document, Dialogue | Document)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """The examples of one file, in order."""

    name: str
    """Of the file, without its folder, or of the data set on the hub."""
    sha256: str
    format: str
    """Which of the known formats it is in."""
    examples: tuple[Dialogue | Document, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One record: an example, or what is wrong with it."""

    record: Record
    format: str | None = None
    example: Dialogue | Document | None = None
    problem: str | None = None
    """File, place and reason in one line."""


def check_records(source: str | Path) -> Iterator[Checked]:
    """Yield each record of `source`, a file or a data set of the hub (`hf:org/name`), checked.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    found: Format | None = None
    for record in read_records(source):
        try:
            found = _same_format(found, record)
            yield Checked(record=record, format=found.name, example=_example(record, found))
        except ValueError as error:
            yield Checked(record=record, problem=f"{record.where}: {reason(error)}")


def read_data_file(source: str | Path) -> DataFile:
    """Return the examples in `source`: a file, or a data set of the hub (`hf:org/name`).

    Raises:
        DataError: It cannot be read, is empty, mixes formats, or has records that cannot be trained on; the first of
            them is named.
    """
    examples: list[Dialogue | Document] = []
    problems: list[str] = []
    format_name = ""
    for checked in check_records(source):
        if checked.problem is not None:
            problems.append(checked.problem)
        elif checked.example is not None:
            examples.append(checked.example)
            format_name = checked.format or format_name
    if problems:
        more = f" ({len(problems) - 1} more records are wrong)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    if not examples:
        raise DataError(f"{source}: there is nothing in it; a record has the fields {known_formats()}.")
    return DataFile(
        name=source_name(source), sha256=source_sha256(source), format=format_name, examples=tuple(examples)
    )


def source_name(source: str | Path) -> str:
    """Return the name of a file without its folder, or of the data set on the hub."""
    return str(source) if str(source).startswith(HUB_PREFIX) else Path(source).name


def source_sha256(source: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the records of a data set on the hub."""
    if not str(source).startswith(HUB_PREFIX):
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for record in read_records(source):
        digest.update(json.dumps(record.fields, ensure_ascii=False, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _same_format(found: Format | None, record: Record) -> Format:
    if record.fields is None:
        raise ValueError(record.problem)
    this = format_of(record.fields)
    if this is None:
        raise ValueError(f"has the fields {', '.join(record.fields) or 'none'}; known are {known_formats()}")
    if found is not None and this is not found:
        raise ValueError(f"is in the format {this.name}, and those before it in {found.name}; use one file for each")
    return this


def _example(record: Record, found: Format) -> Dialogue | Document:
    assert record.fields is not None
    example = Example.model_validate(found.canonical(record.fields))
    if example.text is not None:
        return Document(where=record.where, text=example.text)
    return Dialogue(
        where=record.where,
        messages=example.messages,
        tools=example.tools,
        answer_contains=example.answer_contains,
    )


def reason(error: ValueError) -> str:
    """Return what is wrong with a record, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def split_held_out(examples: Sequence[Item], *, seed: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return the examples to train on and those to hold out (a tenth, at least one), each in the file's order.

    Raises:
        DataError: One example alone cannot be split.
    """
    if len(examples) < 2:
        raise DataError("One example cannot be split into training and evaluation; add more, or give --eval-data.")
    number = max(1, round(len(examples) * HELD_OUT_SHARE))
    held_out = set(random.Random(seed).sample(range(len(examples)), number))  # noqa: S311 -- a split, not a secret
    train = tuple(d for i, d in enumerate(examples) if i not in held_out)
    return train, tuple(examples[i] for i in sorted(held_out))
