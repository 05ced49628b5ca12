"""Signs of broken or inconsistent text, above all in Japanese."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
"""Hiragana, katakana, and the ideographs in use."""
FULL_WIDTH = re.compile(r"[０-９Ａ-Ｚａ-ｚ]")
HALF_WIDTH = re.compile(r"[0-9A-Za-z]")
HALF_WIDTH_KATAKANA = re.compile(r"[\uff66-\uff9f]")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
INVISIBLE = re.compile(r"[\u200b\u2060\ufeff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One kind of fault."""

    name: str
    advice: str
    is_in: Callable[[str], bool]


def is_mojibake(text: str) -> bool:
    """Return whether `text` is Japanese in UTF-8 that was read as Windows' western code page."""
    if JAPANESE.search(text):
        return False
    try:
        read_as = b"".join(_western_byte(character) for character in text)
    except UnicodeEncodeError:  # has what that code page does not
        return False
    return bool(JAPANESE.search(read_as.decode("utf-8", "ignore")))


def _western_byte(character: str) -> bytes:
    # Five bytes have no character in the code page; readers leave them as they are.
    return character.encode("latin-1" if character < "\u0100" else "cp1252")


FAULTS = (
    Fault(
        name="replacement characters",
        advice="a decoder gave up on these bytes; read the source again in its own encoding",
        is_in=lambda text: "\N{REPLACEMENT CHARACTER}" in text,
    ),
    Fault(
        name="mojibake",
        advice="UTF-8 was read as another encoding; read the source again as UTF-8",
        is_in=is_mojibake,
    ),
    Fault(
        name="control characters",
        advice="the model would learn to write them; remove them",
        is_in=lambda text: bool(CONTROL.search(text)),
    ),
    Fault(
        name="invisible characters",
        advice="zero-width blanks and byte-order marks; remove them",
        is_in=lambda text: bool(INVISIBLE.search(text)),
    ),
    Fault(
        name="half-width katakana",
        advice="NFKC turns it into the usual one",
        is_in=lambda text: bool(HALF_WIDTH_KATAKANA.search(text)),
    ),
    Fault(
        name="full- and half-width letters or digits in one text",
        advice="NFKC makes them one; two ways to write a number are two things to learn",
        is_in=lambda text: bool(FULL_WIDTH.search(text) and HALF_WIDTH.search(text)),
    ),
    Fault(
        name="decomposed characters",
        advice="か and a voicing mark for が, as file names of macOS have it; NFC joins them",
        is_in=lambda text: not unicodedata.is_normalized("NFC", text),
    ),
)
