"""An application behind the real gate, whose routes say what came through; asked in process, by its own clock."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.keys import KeyStore
from serve_apps.call import Call, CallMiddleware, call_of
from serve_apps.gate import Gate, admission_of, require_admin
from serve_apps.http_app import refusal_response
from serve_apps.keyring import Keyring
from serve_apps.refusals import Refusal

REMOTE = ("203.0.113.7", 40000)
CHAT = "/v1/chat/completions"
START = datetime(2026, 3, 1, tzinfo=UTC)


class Gated:
    """The application, its keys, and what was noted of its requests."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 0.0
        self.folder = folder / "keys"
        self.store = KeyStore(self.folder)
        self.calls: list[Call] = []
        self.app = FastAPI()
        clock = lambda: self.now_s  # noqa: E731
        options: dict[str, Any] = {"keyring": Keyring(self.store, clock), "clock": clock, "now": self.now}
        self.app.add_middleware(Gate, refuse=refusal_response, **options)
        self.app.add_middleware(CallMiddleware, observers=[self.calls.append])
        self.app.add_exception_handler(Refusal, _refused)
        self.app.get("/health")(_headers)
        self.app.get("/state")(_headers)
        self.app.get("/v1/models")(_headers)
        self.app.post(CHAT)(_chat)
        self.app.post("/v1/adapters")(_admin)

    def now(self) -> datetime:
        """Return the date after `now_s` seconds."""
        return START + timedelta(seconds=self.now_s)

    def key(self, name: str = "ci", **options: Any) -> str:
        """Make a key, known to the gate at once; its token is returned."""
        _, token = self.store.create(name, **options)
        self.now_s += 100
        return token

    def run(self, ask: Callable[[httpx.AsyncClient], Awaitable[Any]], client: tuple[str, int] = REMOTE) -> Any:
        """Return what `ask` does with a client at this address."""

        async def session() -> Any:
            transport = httpx.ASGITransport(self.app, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
                return await ask(http)

        return asyncio.run(session())

    def get(
        self,
        token: str = "",
        path: str = "/v1/models",
        *,
        headers: dict[str, str] | None = None,
        client: tuple[str, int] = REMOTE,
    ) -> httpx.Response:
        """Return the answer to a GET."""
        all_headers = ({"authorization": f"Bearer {token}"} if token else {}) | (headers or {})
        answer: httpx.Response = self.run(lambda http: http.get(path, headers=all_headers), client)
        return answer

    def chat(self, token: str, **body: Any) -> httpx.Response:
        """Return the answer to a POST; `use` is the (model, adapter, version) that is wanted."""
        headers = {"authorization": f"Bearer {token}"}
        answer: httpx.Response = self.run(lambda http: http.post(CHAT, json={"use": ["m"], **body}, headers=headers))
        return answer


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error, which has OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refusal_response(error)


async def _headers(request: Request) -> dict[str, Any]:
    return dict(request.headers)


async def _chat(request: Request) -> Response:
    call, body = call_of(request), await request.json()
    admission = admission_of(call)
    admission.check(*body["use"])
    admission.reserve(body, "chat", 1000)
    call.response_headers |= admission.quota.headers()
    if body.get("refused"):
        raise Refusal("No.")
    if body.get("stream"):
        return StreamingResponse(_events(call, body))
    call.num_completion_tokens = body.get("used", 0)
    return JSONResponse({"num_bytes": admission.num_body_bytes, "headers": dict(request.headers)})


async def _events(call: Call, body: dict[str, Any]) -> Any:
    for _ in range(3):
        yield "data: x\n\n"
        await asyncio.sleep(0.001)
    call.num_completion_tokens = body["used"]
    yield "data: [DONE]\n\n"


async def _admin(request: Request) -> dict[str, Any]:
    require_admin(call_of(request))
    return {}
