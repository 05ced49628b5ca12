"""Clients that stream without pause from an endpoint, and note how every request ended."""

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import httpx

Ending = Literal["done", "503", "error event", "broken", "unreachable", "proxy's 500", "proxy's 404", "wrong"]
PAUSE_S = 0.3
"""Before a request is tried again."""
MAX_TRIES = 200
TRY_TIMEOUT_S = 90.0


@dataclass(kw_only=True, slots=True)
class Try:
    """One HTTP request."""

    begin_s: float
    ending: Ending = "wrong"
    """All but `done` and `wrong` tell the client to try again; `broken` is a connection that was cut."""
    end_s: float = 0.0
    detail: str = ""
    version: str = ""
    """Of the adapter that answered."""


@dataclass(kw_only=True)
class Load:
    """A context in which `num_clients` ask `body`, each again and again; a request that fails is tried again."""

    url: str
    body: dict[str, Any]
    num_clients: int = 16
    tries: list[Try] = field(default_factory=list)
    num_given_up: int = 0
    """Requests that failed `MAX_TRIES` times."""
    num_tries_of_failed: list[int] = field(default_factory=list)
    """How many tries it took, of each request that failed at first."""
    _open: set[int] = field(default_factory=set)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def num_open(self) -> int:
        """Return the streams that are under way."""
        return len(self._open)

    @property
    def endings(self) -> Counter[str]:
        """Return how many tries ended in which way."""
        return Counter(one.ending for one in self.tries)

    def wait_done(self, count: int, timeout_s: float = 60) -> None:
        """Return when `count` more requests have been answered in full."""
        wanted, deadline = self.endings["done"] + count, time.monotonic() + timeout_s
        while self.endings["done"] < wanted:
            assert time.monotonic() < deadline, f"nothing more is answered: {self.endings}"
            time.sleep(0.05)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=TRY_TIMEOUT_S, limits=limits) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(self.num_clients)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        while not self._is_over.is_set():
            num_tries = 0
            while True:
                num_tries += 1
                if (await self._try(http, number)).ending == "done":
                    break
                if num_tries == MAX_TRIES:
                    self.num_given_up += 1
                    return
                await asyncio.sleep(PAUSE_S)
            if num_tries > 1:
                self.num_tries_of_failed.append(num_tries)

    async def _try(self, http: httpx.AsyncClient, number: int) -> Try:
        one = Try(begin_s=time.monotonic())
        try:
            async with http.stream("POST", "/v1/chat/completions", json={**self.body, "stream": True}) as answer:
                one.version = answer.headers.get("x-kajiya-adapter", "")
                if answer.status_code == 200:
                    self._open.add(number)
                    one.ending, one.detail = ending_of([line async for line in answer.aiter_lines() if line])
                else:
                    one.detail = f"{answer.status_code} {(await answer.aread()).decode()[:300]}"
                    one.ending = ending_of_error(answer, one.detail)
        except httpx.ConnectError:
            one.ending = "unreachable"
        except httpx.TransportError as error:
            one.ending, one.detail = "broken", type(error).__name__
        self._open.discard(number)
        one.end_s = time.monotonic()
        self.tries.append(one)
        return one


def ending_of(lines: list[str]) -> tuple[Ending, str]:
    """Return how a stream of events ended that the server closed in order."""
    for line in lines:
        if line.startswith('data: {"error"'):
            error = json.loads(line.removeprefix("data: "))["error"]
            return "error event", f"{error['code']}: {error['message']}"
    return ("done", "") if lines and lines[-1] == "data: [DONE]" else ("wrong", f"ends with {lines[-1:]}")


def ending_of_error(answer: httpx.Response, detail: str) -> Ending:
    """Return what an answer is that has no stream; `detail` is its status and body."""
    if answer.status_code == 503 and '{"error"' in detail and "retry-after" in answer.headers:
        return "503"
    if answer.status_code == 404 and "Ping http://.../-/routes" in detail:
        return "proxy's 404"  # it listens and has not heard of any application yet
    return "proxy's 500" if detail == "500 Internal Server Error" else "wrong"
