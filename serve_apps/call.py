"""What is known of one HTTP request while it is answered, and the middleware that keeps it."""

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.admission import Admission

REQUEST_ID = re.compile(r"[\w.\-]{1,64}", re.ASCII)
"""What a client may call its own request; anything else is replaced, since it goes into logs."""

CLIENT_LEFT = 499
"""nginx's status for a client that did not wait for the end of its answer."""


@dataclass(kw_only=True, slots=True)
class Call:
    """One request; every room on its way notes what it knows, and observers read it at the end."""

    request_id: str
    method: str
    path: str
    client: str
    """Address the request came from."""
    begin_s: float = field(default_factory=time.monotonic)
    key_id: str | None = None
    """Public id of the API key that was shown."""
    admission: Admission | None = field(default=None, repr=False)
    """What the gate let it in with; None before that, and where nobody needs to be let in."""
    user: str | None = None
    """What the client says of its own user."""
    model: str | None = None
    """Catalog name of the base that answers."""
    adapter: str | None = None
    version: int | None = None
    is_stream: bool = False
    is_complete: bool = False
    """Whether a stream has come to its last event, at which clients may close the connection (OpenAI's does)."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    first_token_s: float | None = None
    """From the request's arrival to the first text of its answer."""
    seconds: float = 0.0
    """From the request's arrival to the last byte."""
    status: int = 500
    """HTTP status; stays 500 when the application raised before it answered."""
    error_code: str | None = None
    response_headers: dict[str, str] = field(default_factory=dict)
    """Added to the answer if they are there before its first byte."""


class CallMiddleware:
    """Gives each request its `Call`, answers with its id and headers, and tells `observers` when it is over."""

    def __init__(self, app: ASGIApp, observers: Sequence[Callable[[Call], None]] = ()) -> None:
        self._app = app
        self._observers = tuple(observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _call(scope)
        has_id = Headers(scope=scope).get("x-request-id") == call.request_id
        scope.setdefault("state", {})["call"] = call

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers = MutableHeaders(scope=message)
                if not has_id:  # Serve's proxy names every request and writes the name on its answer
                    headers["x-request-id"] = call.request_id
                headers.update(call.response_headers)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if not call.is_complete:
                call.status = CLIENT_LEFT
            raise
        finally:
            call.seconds = time.monotonic() - call.begin_s
            for observe in self._observers:
                observe(call)


def call_of(request: Request) -> Call:
    """Return the call that `request` belongs to."""
    call: Call = request.state.call
    return call


def _call(scope: Scope) -> Call:
    given = Headers(scope=scope).get("x-request-id", "")
    return Call(
        request_id=given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"],
        client=(scope.get("client") or ("", 0))[0],
    )
