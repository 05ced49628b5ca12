"""The body of a request, read within its bounds before anything looks at it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from serve_apps.refusals import Refusal

MAX_BODY_BYTES = 4 * 2**20
"""A prompt of 131,072 tokens, the longest context of the catalog, takes about 0.5 MB as text and 1 MB as token ids."""
BODY_TIMEOUT_S = 60.0
"""For the whole body; one that trickles in would hold a place for as long as it likes."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half a UTF-16 pair as JSON escapes it; two of them are a character, one alone is no text (RFC 8259, 8.2)."""


async def read_body(scope: Scope, receive: Receive) -> tuple[int, Receive]:
    """Return the body's length in bytes, and a `receive` that hands it out once and then what `receive` does.

    Raises:
        Refusal: the body is too long (413), whether its length was declared or not, too slow (408), cut off or no text
            (400).
    """
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_long()
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in _chunks(receive):
                num_bytes += len(chunk)
                if num_bytes > MAX_BODY_BYTES:
                    raise _too_long()
                chunks.append(chunk)
    except TimeoutError:
        message = f"The request's body did not arrive within {BODY_TIMEOUT_S:.0f} s."
        raise Refusal(message, code="request_timeout", status=408) from None
    body = b"".join(chunks)
    _check_text(body)
    return num_bytes, _replay(body, receive)


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    is_more = True
    while is_more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal("The request's body was cut off.", code="body_incomplete")
        yield message.get("body", b"")
        is_more = message.get("more_body", False)


def _check_text(body: bytes) -> None:
    """Raise `Refusal` for texts that could not be tokenized, logged or sent back; whether it is JSON is seen later."""
    try:
        # Python's reader of JSON takes UTF-16 and halves of pairs as well; a NUL is in no JSON of UTF-8.
        if "\0" in body.decode():
            raise UnicodeError
        if SURROGATE.search(body):
            json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeError as error:
        message = "The request's body is not UTF-8, or has half of a surrogate pair, such as \\ud83d alone."
        raise Refusal(message) from error
    except (ValueError, RecursionError):  # no JSON
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_long() -> Refusal:
    message = f"The request's body is longer than {MAX_BODY_BYTES} bytes."
    return Refusal(message, code="request_too_large", status=413)
