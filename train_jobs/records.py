"""The records of a file (JSON Lines, JSON, CSV, Parquet, text) or a data set on the hub, and where each stands."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError

HUB_PREFIX = "hf:"
"""Begins the name of a data set on the hub: `hf:org/name`, or `hf:org/name@split`."""
MAX_CSV_FIELD = 2**27
"""Characters; Python's own limit of 131,072 is less than one long document."""


class DataError(UserError, ValueError):
    """Data that cannot be trained on; the text names file, place and reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as it stands in its file; either `fields` or `problem`."""

    where: str
    """File and line, item or row."""
    fields: dict[str, Any] | None = None
    problem: str | None = None


def read_records(source: str | Path) -> Iterator[Record]:
    """Yield the records of `source`, a file or `hf:org/name`; a record that cannot be read carries its problem.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if str(source).startswith(HUB_PREFIX):
        yield from _hub(str(source))
        return
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: no reader for '{path.suffix}'; use one of {', '.join(sorted(READERS))}.")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror or error}).") from None


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield _record(f"{path}:{number}", text)


def _json(path: Path) -> Iterator[Record]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):  # many call JSON Lines .json
        yield from _jsonl(path)
        return
    try:
        items = _parse(content)
    except ValueError as error:
        raise DataError(f"{path}: {_reason(error)}.") from None
    for index, item in enumerate(items):
        where = f"{path}: item {index + 1}"
        yield Record(where=where, fields=item) if isinstance(item, dict) else Record(where=where, problem=_kind(item))


def _csv(path: Path) -> Iterator[Record]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the table as UTF-8.") from None
    if "\0" in text:
        raise DataError(f"{path}: has NUL bytes; is it UTF-16? Save the table as UTF-8.")
    csv.field_size_limit(MAX_CSV_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begin = 2
    try:
        for row in rows:
            where, begin = f"{path}:{begin}", rows.line_num + 1
            if None in row:
                yield Record(where=where, problem=f"has more cells than the header's {len(rows.fieldnames or ())}")
            elif None in row.values():
                yield Record(where=where, problem=f"has fewer cells than the header's {len(row)}")
            else:
                yield Record(where=where, fields={name: cell for name, cell in row.items() if cell != ""})
    except csv.Error as error:
        raise DataError(f"{path}:{begin}: not a table ({error}).") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    fields = {name: cell for name, cell in row.items() if cell is not None}
                    yield Record(where=f"{path}: row {number}", fields=fields)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}).") from None


def _text(path: Path) -> Iterator[Record]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the text as UTF-8.") from None
    if text.strip():
        yield Record(where=str(path), fields={"text": text})


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
"""By a file's suffix."""


def _hub(source: str) -> Iterator[Record]:
    name, _, split = source.removeprefix(HUB_PREFIX).partition("@")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded ({str(error).splitlines()[0]}).") from None
    for number, row in enumerate(rows, start=1):
        fields = {key: value for key, value in row.items() if value is not None}
        yield Record(where=f"{source}: row {number}", fields=fields)


def _record(where: str, line: bytes) -> Record:
    try:
        value = _parse(line)
    except ValueError as error:
        return Record(where=where, problem=_reason(error))
    return Record(where=where, fields=value) if isinstance(value, dict) else Record(where=where, problem=_kind(value))


def _parse(content: bytes) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=no_constant)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


def _kind(value: Any) -> str:
    return f"is {type(value).__name__}, not an object with fields"


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (character {error.pos + 1})"
    return str(error)
