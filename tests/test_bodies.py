import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from gated import CHAT, Gated, error_of

from serve_apps import bodies
from serve_apps.bodies import MAX_BODY_BYTES, read_body
from serve_apps.refusals import Refusal


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


def post(gated: Gated, content: bytes | AsyncIterator[bytes], token: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"}
    answer: httpx.Response = gated.run(lambda http: http.post(CHAT, content=content, headers=headers))
    return answer


async def chunks(num_bytes: int, *, taken: list[int]) -> AsyncIterator[bytes]:
    begin = b'{"use": ["m"], "x": "'
    yield begin
    for place in range(0, num_bytes - len(begin) - 2, 65536):
        taken.append(place)
        yield b"x" * min(65536, num_bytes - len(begin) - 2 - place)
    yield b'"}'


def test_a_body_may_be_as_long_as_the_bound_and_no_longer(gated: Gated) -> None:
    token = gated.key()
    padding = MAX_BODY_BYTES - len(b'{"use": ["m"], "x": ""}')
    answer = post(gated, b'{"use": ["m"], "x": "%s"}' % (b"x" * padding), token)
    assert answer.json()["num_bytes"] == MAX_BODY_BYTES
    answer = post(gated, b'{"use": ["m"], "x": "%s"}' % (b"x" * (padding + 1)), token)
    assert error_of(answer) == (413, "request_too_large")


def test_a_body_of_undeclared_length_is_bounded_too_and_not_read_to_its_end(gated: Gated) -> None:
    token = gated.key()
    answer = post(gated, chunks(MAX_BODY_BYTES, taken=[]), token)
    assert answer.json()["num_bytes"] == MAX_BODY_BYTES
    taken: list[int] = []
    answer = post(gated, chunks(10 * MAX_BODY_BYTES, taken=taken), token)
    assert error_of(answer) == (413, "request_too_large")
    assert len(taken) <= MAX_BODY_BYTES / 65536 + 1


def test_a_declared_length_is_refused_before_anything_is_read() -> None:
    async def receive() -> dict[str, object]:
        raise AssertionError("read")

    scope = {"type": "http", "headers": [(b"content-length", b"%d" % (MAX_BODY_BYTES + 1))]}
    with pytest.raises(Refusal) as refused:
        asyncio.run(read_body(scope, receive))
    assert refused.value.status == 413


def test_a_body_that_trickles_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(Refusal) as refused:
        asyncio.run(read_body({"type": "http", "headers": []}, receive))
    assert refused.value.status == 408


def test_a_body_that_is_cut_off_is_refused() -> None:
    messages: list[dict[str, object]] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"x", "more_body": True},
    ]

    async def receive() -> dict[str, object]:
        return messages.pop()

    with pytest.raises(Refusal, match="cut off"):
        asyncio.run(read_body({"type": "http", "headers": []}, receive))


def test_nobody_without_a_key_has_a_body_read(gated: Gated) -> None:
    gated.key()
    taken: list[int] = []
    assert post(gated, chunks(MAX_BODY_BYTES, taken=taken), "kj-none").status_code == 401
    assert taken == []


@pytest.mark.parametrize(
    "text",
    [
        rb'"\ud83d"',  # the first half of a pair
        rb'"a\uDe00b"',  # the second
        b'"\xed\xa0\xbd"',  # one that is encoded as if it were a character
        b'"\xff"',
        '"é"'.encode("utf-16"),
        rb'"\ud83d"'.decode().encode("utf-16-le"),
    ],
)
def test_what_is_no_text_is_refused_before_anything_reads_it(gated: Gated, text: bytes) -> None:
    answer = post(gated, text if b"\0" in text else b'{"use": ["m"], "x": %s}' % text, gated.key())
    assert error_of(answer)[0] == 400
    assert "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", [rb"\ud83d\ude00", rb"\\ud83d", "\U0001f600".encode()])
def test_whole_pairs_and_backslashes_pass(gated: Gated, text: bytes) -> None:
    assert post(gated, b'{"use": ["m"], "x": "%s"}' % text, gated.key()).status_code == 200
