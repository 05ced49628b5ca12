"""The endpoint as the playground sees it, with answers written by hand; the page and the errors are the real ones."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from serve_apps.http_app import make_app
from serve_apps.playground import playground
from serve_apps.refusals import Refusal

MODELS = [("tiny", None), ("tiny:shop", "tiny"), ("tiny:poet", "tiny"), ("large-instruct", None)]
KEY = "kj-test"
HAIKU = "古池や\n蛙飛びこむ\n水の音\n"
MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><b>bold</b>"


def replica_state(model: str, phase: str, num_running: int, num_gpus: float) -> dict[str, Any]:
    numbers = {"num_running": num_running, "max_replicas": 4, "num_gpus": num_gpus}
    return {"model": model, "phase": phase, "accelerator_type": "L4"} | numbers


def fake_app(bodies: list[dict[str, Any]], *, needs_key: bool = False, token_s: float = 0.005) -> FastAPI:
    """Return the application; the bodies of chat requests go to `bodies`."""
    app = make_app()

    def check(request: Request) -> None:
        if needs_key and request.headers.get("authorization") != f"Bearer {KEY}":
            raise Refusal("Missing or unknown API key.", code="invalid_api_key", status=401)

    @app.get("/")
    async def page() -> HTMLResponse:
        return playground()

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        check(request)
        data = [{"id": name} | ({"parent": parent} if parent else {}) for name, parent in MODELS]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/state")
    async def state(request: Request) -> JSONResponse:
        check(request)
        states = [replica_state("tiny", "running", 2, 0.25), replica_state("large-instruct", "asleep", 0, 2)]
        return JSONResponse({"models": states, "gpus": {"total": 8, "used": 0.5}})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check(request)
        body = await request.json()
        bodies.append(body)
        if body["model"] == "large-instruct":
            raise Refusal("large-instruct is being loaded.", code="model_not_ready", status=503, retry_after_s=5)
        return StreamingResponse(_events(body, token_s), media_type="text/event-stream")

    return app


async def _events(body: dict[str, Any], token_s: float) -> AsyncIterator[str]:
    prompt = body["messages"][-1]["content"]
    name = body["model"].replace("shop", "shop@3")
    texts = {"think": "Tokyo it is.", "markup": MARKUP, "long": HAIKU * 400}
    text = texts.get(prompt, HAIKU * 3 if "poet" in name else f"You said: {prompt}")

    def event(**fields: Any) -> str:
        return f"data: {json.dumps({'model': name, 'choices': [], **fields}, ensure_ascii=False)}\n\n"

    yield event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    if prompt == "think":
        yield event(choices=[{"delta": {"reasoning_content": "The capital? Surely Tokyo."}}])
    for place in range(0, len(text), 3):
        await asyncio.sleep(token_s)
        yield event(choices=[{"delta": {"content": text[place : place + 3]}}])
        if prompt == "cut":
            return
    yield event(choices=[{"delta": {}, "finish_reason": "stop"}])
    yield event(usage={"prompt_tokens": 4, "completion_tokens": 40}) + "data: [DONE]\n\n"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of `app`, served from a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
        listening.close()
