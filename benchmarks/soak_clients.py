"""Many clients that stream without pause, and one that asks for more than there is room for."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

Ending = Literal["done", "429", "503", "error event", "lost"]
PROBE_INTERVAL_S = 0.5
STREAM_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How one request ended."""

    client: int
    """-1 for the one beyond the bound."""
    ending: Ending
    """`lost` is a stream that ended without [DONE] and without an error, or an answer that is none of OpenAI's."""
    first_s: float
    """From the request to its first text, 0 without one."""
    seconds: float
    retry_after_s: float | None = None
    detail: str = ""


@dataclass(kw_only=True)
class Soak:
    """What was asked of one endpoint, and what came of it."""

    url: str
    model: str
    max_tokens: int
    answers: list[Answer] = field(default_factory=list)
    num_open: int = 0
    """Requests under way."""

    async def run(self, *, num_streams: int, seconds: float) -> None:
        """Keep `num_streams` under way for `seconds`, then let them end; beyond them, ask for one more now and then."""
        until_s = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=STREAM_TIMEOUT_S, limits=limits) as http:
            clients = (self._client(http, number, until_s) for number in range(num_streams))
            await asyncio.gather(self._probe(http, num_streams, until_s), *clients)

    async def _client(self, http: httpx.AsyncClient, number: int, until_s: float) -> None:
        while time.monotonic() < until_s:
            answer = await self._ask(http, number)
            if answer.retry_after_s is not None:
                await asyncio.sleep(answer.retry_after_s)

    async def _probe(self, http: httpx.AsyncClient, num_streams: int, until_s: float) -> None:
        while time.monotonic() < until_s:
            if self.num_open >= num_streams:
                await self._ask(http, -1)
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _ask(self, http: httpx.AsyncClient, number: int) -> Answer:
        begin, self.num_open = time.monotonic(), self.num_open + 1
        first_s, retry_after_s = 0.0, None
        ending: Ending = "lost"
        detail = ""
        try:
            async with self._request(http, number) as answer:
                if answer.status_code == 200:
                    async for line in answer.aiter_lines():
                        first_s = first_s or (time.monotonic() - begin if has_text(line) else 0.0)
                        ending, detail = ending_after(line, ending, detail)
                else:
                    await answer.aread()
                    ending, detail = refusal_of(answer), f"{answer.status_code} {answer.text[:200]}"
                    retry_after_s = float(answer.headers.get("retry-after", 1))
        except httpx.TransportError as error:
            detail = repr(error)
        self.num_open -= 1
        seconds = time.monotonic() - begin
        self.answers.append(
            Answer(
                client=number,
                ending=ending,
                first_s=first_s,
                seconds=seconds,
                retry_after_s=retry_after_s,
                detail=detail,
            )
        )
        return self.answers[-1]

    @asynccontextmanager
    async def _request(self, http: httpx.AsyncClient, number: int) -> AsyncIterator[httpx.Response]:
        messages = [{"role": "user", "content": f"Client {number}: write a long story."}]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True, "ignore_eos": True}
        body |= {"max_tokens": self.max_tokens, "temperature": 1}
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            yield answer


def has_text(line: str) -> bool:
    """Return whether an event brings text."""
    if not line.startswith('data: {"id"'):
        return False
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


def ending_after(line: str, ending: Ending, detail: str) -> tuple[Ending, str]:
    """Return how a stream would have ended if `line` was its last."""
    if line.startswith('data: {"error"'):
        return "error event", line
    if line == "data: [DONE]" and ending != "error event":
        return "done", ""
    return ending, detail


def refusal_of(answer: httpx.Response) -> Ending:
    """Return which refusal `answer` is; one that does not say when to ask again is none."""
    is_openai = answer.text.startswith('{"error"') and "retry-after" in answer.headers
    if is_openai and answer.status_code == 429:
        return "429"
    return "503" if is_openai and answer.status_code == 503 else "lost"
