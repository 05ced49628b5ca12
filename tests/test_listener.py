"""A request that comes in beside Serve's proxy ends when its client leaves, and not before."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serve_apps import listener
from serve_apps.listener import DirectRequests
from serve_apps.waking import UNDER_WAY

SCOPE: Scope = {"type": "http", "path": "/v1/models", "method": "GET", "headers": []}


class Response:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


@pytest.fixture(autouse=True)
def outside_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_name", lambda _: None)


def run(app: Callable[..., Any], *messages: dict[str, Any], then_leaves: bool) -> list[dict[str, Any]]:
    """Let `app` answer a client that sends `messages` and then leaves or waits; return what it was sent."""
    sent: list[dict[str, Any]] = []
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        if not then_leaves:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(DirectRequests(app)(SCOPE, receive, send), timeout=5))
    return sent


def test_the_body_arrives_and_the_answer_ends_without_a_word_of_the_client() -> None:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        body = [(await receive())["body"] for _ in range(6)]  # more than are read ahead
        await send({"type": "http.response.body", "body": b"".join(body)})

    parts = [{"type": "http.request", "body": bytes([65 + i]), "more_body": i < 5} for i in range(6)]
    assert run(app, *parts, then_leaves=False) == [{"type": "http.response.body", "body": b"ABCDEF"}]


def test_a_client_that_leaves_cancels_the_answer_and_what_replicas_were_asked() -> None:
    response = Response()
    was_cancelled = []

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        UNDER_WAY.get([]).append(response)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            was_cancelled.append(True)
            raise

    assert run(app, then_leaves=True) == []
    assert was_cancelled == [True]
    assert response.is_cancelled


def test_who_leaves_after_the_last_byte_cancels_nothing() -> None:
    response = Response()
    is_over = []

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        UNDER_WAY.get([]).append(response)
        await send({"type": "http.response.body", "body": b"all"})
        await asyncio.sleep(0.05)  # what is written down afterwards
        is_over.append(True)

    run(app, then_leaves=True)
    assert is_over == [True]
    assert not response.is_cancelled


def test_an_error_of_the_application_is_raised_where_the_server_logs_it() -> None:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("gone")

    logging.disable()
    try:
        with pytest.raises(KeyError, match="gone"):
            run(app, then_leaves=False)
    finally:
        logging.disable(logging.NOTSET)
