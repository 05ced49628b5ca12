"""From the start of an application to its first token, model on disk: ours beside Ray Serve LLM with vLLM.

Each start is a process and a Ray of its own, and the two take turns. The clock runs from before the application's own
imports, on an empty Ray Serve, to the first text of a stream.
"""

import asyncio
import statistics
import sys
import time

from benchmarks.adapter_files import MODEL
from benchmarks.bench import Bench
from benchmarks.child import run_module
from benchmarks.claims import Claim, Result
from benchmarks.load import Target, run_round, spread
from benchmarks.servers import run_kajiya, run_ray_serve_llm, serve_instance

OURS, RAY_SERVE_LLM = "kajiya", "Ray Serve LLM + vLLM"
NUM_STARTS = 3


def measure(bench: Bench) -> Result:
    """Return the seconds of each start."""
    seconds: dict[str, list[float]] = {OURS: [], RAY_SERVE_LLM: []}
    for _ in range(NUM_STARTS):
        for name, measured in seconds.items():
            measured.append(run_module("benchmarks.start", name, str(bench.model_folder), bench.key))
    ours, peer = (statistics.median(measured) for measured in seconds.values())
    return Result(
        numbers={name: spread(measured) for name, measured in seconds.items()},
        unit="s",
        claims=(Claim(what="start over the peer's", measured=ours / peer, bound=0.4, direction="at most"),),
    )


def start_once(name: str, model_folder: str, key: str) -> float:
    """Return the seconds of one start."""
    from pathlib import Path

    with serve_instance() as url:
        begin = time.perf_counter()
        if name == OURS:
            url = run_kajiya(MODEL)
        else:
            run_ray_serve_llm(MODEL, Path(model_folder), prefix="/")
        target = Target(url=url, models=(MODEL,), headers={"Authorization": f"Bearer {key}"})
        answer = asyncio.run(run_round(target, num_streams=1, max_tokens=1))
        seconds = time.perf_counter() - begin
        if not answer.texts[0]:
            raise RuntimeError(f"{name} answered nothing")
        return seconds


if __name__ == "__main__":
    print(start_once(*sys.argv[1:]))
