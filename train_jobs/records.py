"""The records of a file (JSON Lines, JSON, CSV, Parquet, text) or a data set on the hub, and where each stands."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from train_jobs.json_items import json_items, parse_json

HUB_PREFIX = "hf:"
"""Begins the name of a data set on the hub: `hf:org/name`, or `hf:org/name@split`."""
MAX_CSV_FIELD = 2**27
"""Characters; Python's own limit of 131,072 is less than one long document."""
BUFFER_CHARACTERS = 2**20
"""Of a JSON array that are read at a time, at least."""
PARQUET_ROWS = 1024
"""Rows that are decoded at a time."""


class DataError(UserError, ValueError):
    """Data that cannot be trained on; the text names file, place and reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as it stands in its file: `fields`, `problem`, or a `line` that is yet to be `parsed`."""

    where: str
    """File and line, item or row."""
    fields: dict[str, Any] | None = None
    problem: str | None = None
    line: bytes | None = None
    """JSON. Parsing takes longer than reading, and is done where the record is used."""


def parsed(record: Record) -> Record:
    """Return `record` with its `fields`, or with the reason why it has none."""
    return record if record.line is None else _record(record.where, record.line)


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
                yield Record(where=f"{path}:{number}", line=text)


def _json(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        is_array = file.read(BUFFER_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:  # many call JSON Lines .json
        yield from _jsonl(path)
        return
    number = 1
    try:
        for item in json_items(path, read_characters=BUFFER_CHARACTERS):
            where, number = f"{path}: item {number}", number + 1
            is_record = isinstance(item, dict)
            yield Record(where=where, fields=item) if is_record else Record(where=where, problem=_kind(item))
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except ValueError as error:
        raise DataError(f"{path}: item {number}: {_reason(error)}.") from None


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_CSV_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    begin = 2
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(_without_nul(file, path), delimiter=delimiter, strict=True)
        try:
            if repeated := _repeated(rows.fieldnames or ()):
                raise DataError(f"{path}:1: the header names {repeated!r} twice.")
            for row in rows:
                where, begin = f"{path}:{begin}", rows.line_num + 1
                if None in row:
                    yield Record(where=where, problem=f"has more cells than the header's {len(rows.fieldnames or ())}")
                elif None in row.values():
                    yield Record(where=where, problem=f"has fewer cells than the header's {len(row)}")
                else:
                    yield Record(where=where, fields={name: cell for name, cell in row.items() if cell != ""})
        except UnicodeDecodeError:
            raise _not_utf8(path) from None
        except csv.Error as error:
            raise DataError(f"{path}:{begin}: not a table ({error}).") from None


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise DataError(f"{path}: has NUL bytes; is it UTF-16? Save the table as UTF-8.")
        yield line


def _not_utf8(path: Path) -> DataError:
    """Return what to say of a file that holds bytes that are no UTF-8."""
    good_lines = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError:
                break
            good_lines += 1
    return DataError(f"{path}:{good_lines + 1}: not UTF-8; save it as UTF-8.")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    fields = {name: cell for name, cell in row.items() if cell is not None}
                    yield Record(where=f"{path}: row {number}", fields=fields)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}).") from None


def _text(path: Path) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
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


def source_bytes(source: str | Path) -> int:
    """Return the size of a file, or of a data set on the hub as it lies in the cache.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if str(source).startswith(HUB_PREFIX):
        return int(_hub_rows(str(source)).data.nbytes)
    return Path(source).stat().st_size


def _hub(source: str) -> Iterator[Record]:
    # The rows lie in memory-mapped files: only those that are looked at are read.
    for number, row in enumerate(_hub_rows(source), start=1):
        fields = {key: value for key, value in row.items() if value is not None}
        yield Record(where=f"{source}: row {number}", fields=fields)


def _hub_rows(source: str) -> Any:
    name, _, split = source.removeprefix(HUB_PREFIX).partition("@")
    if not name:
        raise DataError(f"{source}: names no data set; give it as {HUB_PREFIX}org/name, or {HUB_PREFIX}org/name@split.")
    import datasets

    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{source}: cannot be loaded ({said[0]}).") from None


def _record(where: str, line: bytes) -> Record:
    try:
        value = parse_json(line)
    except ValueError as error:
        return Record(where=where, problem=_reason(error))
    return Record(where=where, fields=value) if isinstance(value, dict) else Record(where=where, problem=_kind(value))


def _kind(value: Any) -> str:
    return f"is {kind_of(value)}, not an object with fields"


def kind_of(value: Any) -> str:
    """Return what `value` is called in a file."""
    return "null" if value is None else type(value).__name__


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        said = "more follows the record, and each has a line of its own" if error.msg == "Extra data" else error.msg
        return f"not JSON: {said} (character {error.pos + 1})"
    return str(error)
