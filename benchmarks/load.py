"""Streams of a chat endpoint at the same time, timed by their reader."""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass

import httpx

CITIES = (
    *("Tokyo", "Paris", "Kyoto", "Rome", "Lima", "Oslo", "Cairo", "Delhi"),
    *("Seoul", "Quito", "Bern", "Riga", "Sofia", "Accra", "Doha", "Hanoi"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One answer, as it arrived."""

    text: str
    first_s: float
    """From the request to the first text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """All streams of one round."""

    texts: tuple[str, ...]
    seconds: float
    """From the first request to the last byte."""
    median_first_s: float


async def run_round(url: str, model: str, *, num_streams: int, max_tokens: int) -> Round:
    """Ask `num_streams` greedy questions at once and read their streams to the end."""
    async with httpx.AsyncClient(timeout=600) as http:
        begin = time.perf_counter()
        asked = (_stream(http, url, model, CITIES[i % len(CITIES)], max_tokens) for i in range(num_streams))
        streams = await asyncio.gather(*asked)
        seconds = time.perf_counter() - begin
    return Round(
        texts=tuple(stream.text for stream in streams),
        seconds=seconds,
        median_first_s=statistics.median(stream.first_s for stream in streams),
    )


async def _stream(http: httpx.AsyncClient, url: str, model: str, city: str, max_tokens: int) -> Stream:
    question = f"Write a long story about the city of {city} and its history, in detail."
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    body |= {"temperature": 0, "max_tokens": max_tokens}
    begin, first_s, text = time.perf_counter(), 0.0, ""
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices")
            new = (choices[0]["delta"].get("content") or "") if choices else ""
            if new and not text:
                first_s = time.perf_counter() - begin
            text += new
    return Stream(text=text, first_s=first_s)
