"""The ingress's own HTTP server, in place of Serve's proxy.

The proxy is a Python process that hands each request and each piece of an answer from one process to the other; its
share of a first token is larger than that of ingress, keys and routing together.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray.serve.context
import uvicorn
from fastapi import FastAPI
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.door import Address, listening_socket
from serve_apps.waking import UNDER_WAY

KEEP_ALIVE_S = 90
"""Of idle connections; Serve's own, longer than clients keep theirs (httpx: 5 s), so that the client closes first."""
MESSAGES_AHEAD = 4
"""Pieces of a body that are read before they are wanted."""


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[None]:
    """Answer at `app.state.address` while the application runs; with None, Serve's proxy is the only way in.

    At its end nothing new is accepted, and what is being answered is answered to its end.
    """
    address: Address | None = app.state.address
    if address is None:
        yield
        return
    config = uvicorn.Config(
        RequestIdMiddleware(DirectRequests(app)),
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    opened = await asyncio.to_thread(listening_socket, address)
    serving = asyncio.create_task(server.serve(sockets=[opened]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class DirectRequests:
    """What Serve does around a request that comes through its proxy: it has a name, and ends when its client leaves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and cancel it when the client has left before the end of its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _name(scope)
        under_way: list[Any] = []
        UNDER_WAY.set(under_way)
        is_answered = False
        messages: asyncio.Queue[Message] = asyncio.Queue(MESSAGES_AHEAD)

        async def send_and_note(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def read_until_left() -> None:
            while True:
                message = await receive()
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    return

        reading = asyncio.create_task(read_until_left())
        answering = asyncio.ensure_future(self._app(scope, messages.get, send_and_note))
        try:
            await asyncio.wait((reading, answering), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not is_answered:
                answering.cancel()
                for response in under_way:
                    response.cancel()
            await asyncio.wait((answering,))
        finally:
            reading.cancel()
            answering.cancel()
        if not answering.cancelled():
            answering.result()


def _name(scope: Scope) -> None:
    """Let handles and log lines of this request carry its id."""
    context = ray.serve.context._RequestContext(
        route=scope["path"],
        request_id=Headers(scope=scope).get("x-request-id", ""),
        app_name=ray.serve.get_replica_context().app_name,
    )
    ray.serve.context._serve_request_context.set(context)
