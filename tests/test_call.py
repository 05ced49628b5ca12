import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from serve_apps.call import Call, CallMiddleware, call_of


def ask(app: FastAPI, path: str = "/", **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get(path, headers=headers)

    return asyncio.run(send())


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def app(calls: list[Call]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(CallMiddleware, observers=[calls.append])

    @app.get("/")
    async def name(request: Request) -> dict[str, Any]:
        call_of(request).response_headers["x-kajiya-model"] = "m"
        return {"id": call_of(request).request_id}

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("no")

    return app


def test_a_request_keeps_its_id_and_its_answer_has_the_calls_headers(app: FastAPI) -> None:
    answer = ask(app, **{"x-request-id": "mine-1"})
    assert answer.json() == {"id": "mine-1"}
    assert "x-request-id" not in answer.headers  # the proxy, which named the request, names its answer
    assert answer.headers["x-kajiya-model"] == "m"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, 'a"b'])
def test_an_id_that_could_forge_a_log_line_is_replaced(app: FastAPI, given: str) -> None:
    replaced = ask(app, **{"x-request-id": given}).headers["x-request-id"]
    assert replaced != given
    assert len(replaced) == 32


def test_observers_hear_of_every_request_at_its_end(app: FastAPI, calls: list[Call]) -> None:
    ask(app)
    ask(app, "/nowhere")
    ask(app, "/broken")
    assert [(call.path, call.status) for call in calls] == [("/", 200), ("/nowhere", 404), ("/broken", 500)]
    assert all(0 < call.seconds < 60 for call in calls)


def test_a_client_that_leaves_is_told_from_an_application_that_fails(app: FastAPI, calls: list[Call]) -> None:
    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    async def leave() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(http.get("/slow"), 0.05)

    asyncio.run(leave())
    assert [call.status for call in calls] == [499]


def test_a_client_that_closes_at_the_last_event_has_not_left_early(app: FastAPI, calls: list[Call]) -> None:
    @app.get("/stream")
    async def stream(request: Request, told: bool) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            yield "data: x\n\n"
            call_of(request).is_complete = told
            await asyncio.sleep(60)

        return StreamingResponse(events())

    async def leave(path: str) -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(http.get(path), 0.2)

    for told in (True, False):
        asyncio.run(leave(f"/stream?told={told}"))
    assert [call.status for call in calls] == [200, 499]
