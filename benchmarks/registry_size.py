"""A registry of 1,000 adapters beside one of a single adapter: the same request, and the list of models."""

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from benchmarks.adapter_files import MODEL, register, write_adapters
from benchmarks.bench import Bench
from benchmarks.claims import Claim, Result
from benchmarks.load import run_round, spread

NUM_ADAPTERS = 1000
NUM_BLOCKS = 5
PER_BLOCK = 8
MAX_TOKENS = 8


def measure(bench: Bench) -> Result:
    """Return request times at both sizes, in turns, and the times of the list at the larger one."""
    show, hide = _others(bench)
    few: list[float] = []
    many: list[float] = []
    lists: list[float] = []
    for block in range(NUM_BLOCKS + 1):
        hide()
        few += _requests(bench) if block else _requests(bench)[:0]
        show()
        many += _requests(bench) if block else _requests(bench)[:0]
        lists += _lists(bench)
    ratio = statistics.median(many) / statistics.median(few)
    return Result(
        numbers={
            "a request, 1 adapter": spread(few),
            f"a request, {NUM_ADAPTERS:,} adapters": spread(many),
            f"/v1/models, {NUM_ADAPTERS:,} adapters": spread(lists),
        },
        unit="ms",
        claims=(
            Claim(what="a request with 1,000 adapters over 1", measured=ratio, bound=1.05, direction="at most"),
            Claim(
                what="/v1/models with 1,000 adapters",
                measured=statistics.median(lists),
                bound=200,
                direction="at most",
                unit="ms",
            ),
        ),
    )


def _others(bench: Bench) -> tuple[Callable[[], None], Callable[[], None]]:
    """Register all adapters but one that is asked; return what shows the others and what takes them away again."""
    asked, *_ = bench.adapters
    (folder,) = write_adapters(
        bench.model_folder, bench.home / "small", names=("one",), r=1, target_modules=("q_proj",)
    ).values()
    register({f"x{i}": folder for i in range(NUM_ADAPTERS - len(bench.adapters))})
    shown = Path(os.environ["KAJIYA_REGISTRY"]) / MODEL
    hidden = bench.home / "hidden"
    hidden.mkdir()
    others = [path.name for path in shown.iterdir() if path.is_dir() and path.name != asked]

    def move(source: Path, target: Path) -> None:
        for name in others:
            if (source / name).exists():
                (source / name).rename(target / name)

    return (lambda: move(hidden, shown)), (lambda: move(shown, hidden))


def _requests(bench: Bench) -> list[float]:
    asked, *_ = bench.adapters
    target = bench.kajiya(f"{MODEL}:{asked}")
    rounds = [asyncio.run(run_round(target, num_streams=1, max_tokens=MAX_TOKENS)) for _ in range(PER_BLOCK)]
    return [1000 * measured.seconds for measured in rounds]


def _lists(bench: Bench) -> list[float]:
    target, times = bench.kajiya(), []
    with httpx.Client(headers=target.headers, timeout=60) as http:
        for _ in range(PER_BLOCK):
            begin = time.perf_counter()
            listed = http.get(f"{target.url}/v1/models").raise_for_status().json()["data"]
            times.append(1000 * (time.perf_counter() - begin))
            if len(listed) < NUM_ADAPTERS:
                raise RuntimeError(f"/v1/models lists {len(listed)} models")
    return times
