"""What HTTP, keys and the ingress cost: the engine, called in a process of its own, beside the whole application."""

import asyncio
import statistics
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.adapter_files import MODEL
from benchmarks.bench import Bench
from benchmarks.claims import Claim, Result
from benchmarks.load import question, run_round, spread
from cluster.catalog import find
from cluster.hardware import detect
from cluster.plan import plan_serving
from serve_apps.engine import Engine, Progress
from serve_apps.runtime import Runtime, start_runtime
from serve_apps.sampling import Sampling

NUM_SINGLE = 30
"""Requests, one at a time, whose first token is timed."""


def measure(bench: Bench) -> Result:
    """Return speeds at all streams and times to the first token at one, from alternating rounds."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_start) as engine:
        alone, through = _speeds(bench, engine)
        first_alone, first_through = _first_times(bench, engine)
        engine.submit(_stop).result()
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


def _speeds(bench: Bench, engine: Executor) -> tuple[list[float], list[float]]:
    alone, through = [], []
    for number in range(bench.num_rounds + 1):
        tokens, seconds, _ = engine.submit(_round, bench.num_streams, bench.max_tokens).result()
        measured = asyncio.run(run_round(bench.kajiya(), num_streams=bench.num_streams, max_tokens=bench.max_tokens))
        if number:
            alone.append(tokens / seconds)
            through.append(measured.tokens_per_s(bench.tokenizer))
    return alone, through


def _first_times(bench: Bench, engine: Executor) -> tuple[list[float], list[float]]:
    alone, through = [], []
    for number in range(NUM_SINGLE + 1):
        _, _, first_s = engine.submit(_round, 1, 4).result()
        measured = asyncio.run(run_round(bench.kajiya(), num_streams=1, max_tokens=4))
        if number:
            alone.append(1000 * first_s)
            through.append(1000 * measured.median_first_s)
    return alone, through


# What follows runs in the engine's process: there, as in a replica, nothing else computes.
_runtime: list[Runtime] = []


def _start() -> None:
    _runtime.append(start_runtime(plan_serving(find(MODEL), detect())))


def _stop() -> None:
    engine = _runtime[0].engine
    assert isinstance(engine, Engine)
    engine.stop()


def _round(num_streams: int, max_tokens: int) -> tuple[int, float, float]:
    """Return the tokens of all answers, the seconds to the last, and to the first of the first."""
    (runtime,) = _runtime
    assert isinstance(runtime.engine, Engine)
    prompts = [_prompt(runtime, question(i)) for i in range(num_streams)]
    begin = time.perf_counter()
    tokens, first_s = asyncio.run(_ask(runtime.engine, prompts, max_tokens=max_tokens))
    return tokens, time.perf_counter() - begin, first_s


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
