"""JSON as training data has it: strict, and an array item by item."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def parse_json(content: bytes) -> Any:
    """Return what `content` says; raises `ValueError` for what is no JSON, NaN, and keys that come twice."""
    with _depth_is_a_value():
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant)


@contextmanager
def _depth_is_a_value() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ValueError("has objects or lists inside each other, too many to be read") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


def json_items(path: Path, *, read_characters: int) -> Iterator[Any]:
    """Yield the items of the JSON array in `path`, of which `read_characters` or a little more are in memory at a time.

    Raises:
        ValueError: It is no JSON, from there on; what came before was yielded.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(read_characters)
        begin, position, is_first = 0, text.index("[") + 1, True
        while True:
            position = _after_blanks(text, position)
            try:
                if text.startswith("]", position) and not text[position + 1 :].strip() and not file.read().strip():
                    return
                at = position if is_first else _after_blanks(text, _after_comma(text, position))
                with _depth_is_a_value():
                    item, end = decoder.raw_decode(text, at)
                if not text.startswith((",", "]"), _after_blanks(text, end)):  # a number may go on behind what was read
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            except json.JSONDecodeError as error:
                more = file.read(max(read_characters, len(text)))
                if not more:
                    error.pos += begin
                    raise
                begin, text, position = begin + position, text[position:] + more, 0
                continue
            yield item
            position, is_first = end, False


def _after_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _after_comma(text: str, position: int) -> int:
    if not text.startswith(",", position):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return position + 1
