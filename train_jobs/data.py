"""Training data as it lies in a file or on the hub, read and checked as a whole."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from train_jobs.formats import Format, format_of, known_formats
from train_jobs.messages import Dialogue, Document, Example
from train_jobs.records import HUB_PREFIX, DataError, Record, kind_of, parsed, read_records

HELD_OUT_SHARE = 0.1
"""Share of the examples that is held out where the user brings no evaluation file."""
MAX_HELD_OUT = 1000
"""Examples; the mean loss of more says hardly more, and takes its time before and after training."""
BEGINNING_RECORDS = 10_000
"""A second's worth of checking."""
MAX_NAMES = 8
"""Fields of a record that an error names."""
MAX_NAME = 40
"""Characters of each."""
KINDS = {
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
"""What should have been there, by pydantic's name for the error."""


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
    return check(read_records(source))


def check(records: Iterable[Record], found: Format | None = None) -> Iterator[Checked]:
    """Yield each of `records`, checked to be in the format `found`, or in that of the first of them that is in one."""
    for record in map(parsed, records):
        try:
            found = _same_format(found, record)
            yield Checked(record=record, format=found.name, example=_example(record, found))
        except ValueError as error:
            yield Checked(record=record, problem=f"{record.where}: {_one_line(reason(error))}")


def format_in(source: str | Path) -> Format:
    """Return the format of `source`: that of the first record that is in one.

    Raises:
        DataError: There is none; the source cannot be read.
    """
    first: Record | None = None
    for record in map(parsed, read_records(source)):
        if record.fields is not None and (found := format_of(record.fields)):
            return found
        first = first or record
    if first is None:
        raise _nothing_in(source)
    (checked,) = check([first])
    raise DataError(checked.problem)


def check_beginning(source: str | Path) -> None:
    """Check the first `BEGINNING_RECORDS` records, so that errors come at once; tokenizing checks the others.

    Raises:
        DataError: One of them cannot be trained on, or the source as a whole cannot be read.
    """
    _examples(source, limit=BEGINNING_RECORDS)


def read_data_file(source: str | Path) -> DataFile:
    """Return the examples in `source`: a file, or a data set of the hub (`hf:org/name`).

    Raises:
        DataError: It cannot be read, is empty, mixes formats, or has records that cannot be trained on; the first of
            them is named.
    """
    examples, format_name = _examples(source)
    return DataFile(
        name=source_name(source), sha256=source_sha256(source), format=format_name, examples=tuple(examples)
    )


def _examples(source: str | Path, *, limit: int | None = None) -> tuple[list[Dialogue | Document], str]:
    """Return the examples in the first `limit` records, and their format."""
    examples: list[Dialogue | Document] = []
    problems: list[str] = []
    format_name = ""
    for checked in islice(check_records(source), limit):
        if checked.problem is not None:
            problems.append(checked.problem)
        elif checked.example is not None:
            examples.append(checked.example)
            format_name = checked.format or format_name
    if problems:
        more = f" ({len(problems) - 1} more records are wrong)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    if not examples:
        raise _nothing_in(source)
    return examples, format_name


def _nothing_in(source: str | Path) -> DataError:
    return DataError(f"{source}: there is nothing in it; a record has the fields {known_formats()}.")


def source_name(source: str | Path) -> str:
    """Return the name of a file without its folder, or of the data set on the hub."""
    return str(source) if str(source).startswith(HUB_PREFIX) else Path(source).name


def source_sha256(source: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the records of a data set on the hub."""
    if not str(source).startswith(HUB_PREFIX):
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for record in map(parsed, read_records(source)):
        digest.update(json.dumps(record.fields, ensure_ascii=False, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def examples_at(source: str | Path, numbers: Sequence[int]) -> list[Dialogue | Document]:
    """Return the examples in the records `numbers`, counted from 0 and in order, as far as there are so many.

    Raises:
        DataError: The source as a whole cannot be read, or one of those records cannot be trained on.
    """
    wanted = set(numbers)
    chosen = (record for number, record in enumerate(islice(read_records(source), max(wanted) + 1)) if number in wanted)
    return list(map(_sound, check(chosen)))


def _sound(checked: Checked) -> Dialogue | Document:
    if checked.example is None:
        raise DataError(checked.problem)
    return checked.example


def _same_format(found: Format | None, record: Record) -> Format:
    if record.fields is None:
        raise ValueError(record.problem)
    this = format_of(record.fields)
    if this is None:
        raise ValueError(f"has the fields {_shortened(record.fields)}; known are {known_formats()}")
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
    kind = KINDS.get(first["type"])
    text = f"is {kind_of(first['input'])}, not {kind}" if kind else first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _shortened(names: Iterable[str]) -> str:
    """Return the first few `names`; those of a table without a header are whole texts."""
    few = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…" for name in islice(names, MAX_NAMES + 1)]
    return ", ".join([*few[:MAX_NAMES], *(["…"] if len(few) > MAX_NAMES else [])]) or "none"


def _one_line(text: str) -> str:
    """Return `text` with line breaks, and what no terminal can show, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def held_out_examples(num_examples: int, *, seed: int) -> list[int]:
    """Return which of `num_examples` examples to hold out: a tenth, at least one and at most `MAX_HELD_OUT`.

    Raises:
        DataError: One example alone cannot be split.
    """
    if num_examples < 2:
        raise DataError("One example cannot be split into training and evaluation; add more, or give --eval-data.")
    number = min(MAX_HELD_OUT, max(1, round(num_examples * HELD_OUT_SHARE)))
    return sorted(random.Random(seed).sample(range(num_examples), number))  # noqa: S311 -- a split, not a secret
