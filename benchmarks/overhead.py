"""What HTTP, keys and the ingress cost: the engine called in this process beside the whole application."""

import asyncio
import statistics
import time

from benchmarks.bench import Bench
from benchmarks.claims import Claim, Result
from benchmarks.load import question, run_round, spread
from serve_apps.engine import Engine, Progress
from serve_apps.runtime import Runtime, start_runtime
from serve_apps.sampling import Sampling

NUM_SINGLE = 30
"""Requests, one at a time, whose first token is timed."""


def measure(bench: Bench) -> Result:
    """Return speeds at all streams and times to the first token at one, from alternating rounds."""
    runtime = start_runtime(bench.plan)
    assert isinstance(runtime.engine, Engine)
    try:
        prompts = [_prompt(runtime, question(i)) for i in range(bench.num_streams)]
        alone, through = _speeds(bench, runtime.engine, prompts)
        first_alone, first_through = _first_times(bench, runtime.engine, prompts)
    finally:
        runtime.engine.stop()
    lost = 1 - statistics.median(through) / statistics.median(alone)
    added = statistics.median(first_through) - statistics.median(first_alone)
    return Result(
        numbers={
            "engine alone, tokens/s": spread(alone),
            "through HTTP, tokens/s": spread(through),
            "engine alone, first token, ms": spread(first_alone),
            "through HTTP, first token, ms": spread(first_through),
        },
        unit="as named",
        claims=(
            Claim(what="tokens/s lost to HTTP", measured=100 * lost, bound=5, direction="at most", unit="%"),
            Claim(what="first token later through HTTP", measured=added, bound=10, direction="at most", unit="ms"),
        ),
    )


def _speeds(bench: Bench, engine: Engine, prompts: list[list[int]]) -> tuple[list[float], list[float]]:
    alone, through = [], []
    for number in range(bench.num_rounds + 1):
        begin = time.perf_counter()
        tokens, _ = asyncio.run(_ask(engine, prompts, max_tokens=bench.max_tokens))
        here = tokens / (time.perf_counter() - begin)
        measured = asyncio.run(run_round(bench.kajiya(), num_streams=bench.num_streams, max_tokens=bench.max_tokens))
        if number:
            alone.append(here)
            through.append(measured.tokens_per_s(bench.tokenizer))
    return alone, through


def _first_times(bench: Bench, engine: Engine, prompts: list[list[int]]) -> tuple[list[float], list[float]]:
    alone, through = [], []
    for number in range(NUM_SINGLE + 1):
        _, first_s = asyncio.run(_ask(engine, [prompts[0]], max_tokens=4))
        measured = asyncio.run(run_round(bench.kajiya(), num_streams=1, max_tokens=4))
        if number:
            alone.append(1000 * first_s)
            through.append(1000 * measured.median_first_s)
    return alone, through


def _prompt(runtime: Runtime, text: str) -> list[int]:
    ids: list[int] = runtime.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return ids


async def _ask(engine: Engine, prompts: list[list[int]], *, max_tokens: int) -> tuple[int, float]:
    """Return the tokens of all answers, and the seconds to the first of the first."""
    begin = time.perf_counter()
    firsts: list[float] = []

    async def one(prompt: list[int]) -> int:
        arrived: asyncio.Queue[Progress] = asyncio.Queue()
        engine.submit(
            f"bench-{time.perf_counter_ns()}", prompt, max_tokens=max_tokens, stop_token_ids=[],
            sampling=Sampling(temperature=0), slot=-1, on_progress=arrived.put_nowait,
        )  # fmt: skip
        num_tokens = 0
        while True:
            progress = await arrived.get()
            firsts.append(time.perf_counter() - begin)
            num_tokens += len(progress.token_ids)
            if progress.error is not None:
                raise RuntimeError(progress.error)
            if progress.is_finished:
                return num_tokens

    counts = await asyncio.gather(*map(one, prompts))
    return sum(counts), firsts[0]
