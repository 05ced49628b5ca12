"""Streams of a chat endpoint at the same time, timed by their reader."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from transformers import PreTrainedTokenizerBase

CITIES = (
    *("Tokyo", "Paris", "Kyoto", "Rome", "Lima", "Oslo", "Cairo", "Delhi"),
    *("Seoul", "Quito", "Bern", "Riga", "Sofia", "Accra", "Doha", "Hanoi"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked: an endpoint, and the models its streams ask for in turn."""

    url: str
    models: tuple[str, ...]
    headers: dict[str, str] = field(default_factory=dict)


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

    def tokens_per_s(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the output tokens per second; counted from the texts, the same way for every server."""
        return sum(len(ids) for ids in tokenizer(list(self.texts)).input_ids) / self.seconds


async def run_round(target: Target, *, num_streams: int, max_tokens: int) -> Round:
    """Ask `num_streams` greedy questions at once and read their streams to the end."""
    async with httpx.AsyncClient(timeout=600, headers=target.headers) as http:
        begin = time.perf_counter()
        asked = (
            _stream(http, target.url, target.models[i % len(target.models)], question(i), max_tokens)
            for i in range(num_streams)
        )
        streams = await asyncio.gather(*asked)
        seconds = time.perf_counter() - begin
    return Round(
        texts=tuple(stream.text for stream in streams),
        seconds=seconds,
        median_first_s=statistics.median(stream.first_s for stream in streams),
    )


def alternate(
    targets: dict[str, Target], *, num_rounds: int, num_streams: int, max_tokens: int
) -> dict[str, list[Round]]:
    """Return the rounds of each target, one of each in turn, after one round that does not count.

    What else the machine does meets all of them; those that are not asked are idle.
    """
    rounds: dict[str, list[Round]] = {name: [] for name in targets}
    for number in range(num_rounds + 1):
        for name, target in targets.items():
            measured = asyncio.run(run_round(target, num_streams=num_streams, max_tokens=max_tokens))
            if number:
                rounds[name].append(measured)
    return rounds


def question(number: int) -> str:
    """Return a question with a long answer; streams of one round ask different ones."""
    return f"Write a long story about the city of {CITIES[number % len(CITIES)]} and its history, in detail."


def spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Return median, extremes and all values, for the record."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values), "all": list(values)}


async def _stream(http: httpx.AsyncClient, url: str, model: str, text_in: str, max_tokens: int) -> Stream:
    body = {"model": model, "messages": [{"role": "user", "content": text_in}], "stream": True}
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
