"""256 streams at a time for minutes: memory, fairness, what is turned away and what is lost.

Run it with `python -m benchmarks.soak`. The model is a random one of two layers by default, so that streams begin and
end as often as the machine can carry them; `--model smollm2-135m-instruct` spends the time in the model instead.
"""

import argparse
import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.random_model import write_random_model
from benchmarks.servers import serve_instance
from benchmarks.soak_clients import Soak
from cluster.models.embedded import embedded_folder

NUM_STREAMS = 256
"""As many as the gate lets in at a time."""
MAX_GROWTH = 1.1
"""Memory of a process in the last third of the run over that in the first."""
MAX_SPREAD = 3.0
"""The 99th percentile of a time over its median."""
SAMPLE_INTERVAL_S = 1.0


def main() -> None:
    """Run it, print the tables, write the JSON; exit with 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--streams", type=int, default=NUM_STREAMS)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--model", help="catalog name or folder; by default a random model of two layers")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="kajiya-soak-") as home:
        embedded_folder()  # before the state folder is another
        model = arguments.model or str(write_random_model(Path(home) / "random"))
        os.environ["KAJIYA_HOME"] = f"{home}/state"
        with serve_instance() as url:
            result = soak(url, model, arguments.streams, arguments.tokens, arguments.minutes * 60)
    print_tables(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(bool(result["broken"]))


def soak(url: str, model: str, num_streams: int, max_tokens: int, seconds: float) -> dict[str, Any]:
    """Return the numbers of one run, and which bounds it broke."""
    from ray import serve

    from serve_apps.app import build
    from serve_apps.args import ServeArgs

    serve.run(build(ServeArgs(models=[model])), name="kajiya", route_prefix="/")
    run = Soak(url=url, model=Path(model).name, max_tokens=max_tokens)
    asyncio.run(run.run(num_streams=16, seconds=5))  # what every process needs once is not growth
    run.answers.clear()
    with memory_of(processes()) as memory:
        asyncio.run(run.run(num_streams=num_streams, seconds=seconds))
    return summary(run, memory, num_streams)


def processes() -> dict[str, int]:
    """Return the process ids of the proxy, the ingress and each replica."""
    import ray

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    (proxy,) = details["proxies"].values()
    handle = ray.get_actor(proxy["actor_name"], namespace="serve")
    pids = {"proxy": ray.get(handle.__ray_call__.remote(lambda _: os.getpid()))}
    for name, deployment in details["applications"]["kajiya"]["deployments"].items():
        kind = "ingress" if name == "Ingress" else "replica"
        pids |= {f"{kind} {i + 1}": one["pid"] for i, one in enumerate(deployment["replicas"])}
    return pids


@contextmanager
def memory_of(pids: dict[str, int]) -> Iterator[dict[str, list[int]]]:
    """Yield resident bytes of each process, which a thread samples while the body runs."""
    samples: dict[str, list[int]] = {name: [] for name in pids}
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLE_INTERVAL_S):
            for name, pid in pids.items():
                samples[name].append(psutil.Process(pid).memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def summary(run: Soak, memory: dict[str, list[int]], num_streams: int) -> dict[str, Any]:
    """Return counts, times and memory, and the bounds that are broken."""
    done = [answer for answer in run.answers if answer.ending == "done"]
    endings = Counter(answer.ending for answer in run.answers)
    each = Counter(answer.client for answer in done if answer.client >= 0)
    result: dict[str, Any] = {
        "model": run.model,
        "num_streams": num_streams,
        "endings": dict(endings),
        "beyond_the_bound": dict(Counter(answer.ending for answer in run.answers if answer.client < 0)),
        "streams_per_client": {"fewest": min(each[i] for i in range(num_streams)), "most": max(each.values())},
        "times_s": {"first": spread([a.first_s for a in done]), "total": spread([a.seconds for a in done])},
        "memory": {name: growth(samples) for name, samples in memory.items()},
        "lost": [answer.detail for answer in run.answers if answer.ending == "lost"][:20],
    }
    return result | {"broken": broken(result)}


def spread(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile, their ratio and the largest."""
    percentiles = quantiles(values, n=100)
    p50, p99 = percentiles[49], percentiles[98]
    return {"p50": p50, "p99": p99, "ratio": p99 / p50, "max": max(values)}


def growth(samples: list[int]) -> dict[str, float]:
    """Return the mean bytes of the first and the last third, their ratio and the most."""
    third = max(1, len(samples) // 3)
    first, last = fmean(samples[:third]), fmean(samples[-third:])
    return {"first_bytes": first, "last_bytes": last, "ratio": last / first, "max_bytes": max(samples)}


def broken(result: dict[str, Any]) -> list[str]:
    """Return the bounds that are broken, in words."""
    found = [f"lost: {result['endings']['lost']}"] if result["endings"].get("lost") else []
    if not result["beyond_the_bound"].get("429"):
        found.append("nobody beyond the bound was turned away")
    if result["streams_per_client"]["fewest"] == 0:
        found.append("a client got no answer")
    for name, times in result["times_s"].items():
        if times["ratio"] > MAX_SPREAD:
            found.append(f"{name}: p99 is {times['ratio']:.1f} times the median")
    for name, memory in result["memory"].items():
        if memory["ratio"] > MAX_GROWTH:
            found.append(f"{name} grew {memory['ratio']:.2f} times")
    return found


def print_tables(result: dict[str, Any]) -> None:
    """Print what a reader wants to know."""
    console = Console()
    console.print(f"{result['num_streams']} streams of {result['model']}: {result['endings']}")
    console.print(f"one more than there is room for: {result['beyond_the_bound']}")
    console.print(f"streams per client: {result['streams_per_client']}")
    times = Table("time, s", "p50", "p99", "p99/p50", "max")
    for name, row in result["times_s"].items():
        times.add_row(name, *(f"{row[key]:.2f}" for key in ("p50", "p99", "ratio", "max")))
    console.print(times)
    memory = Table("memory, MiB", "first third", "last third", "ratio", "max")
    for name, row in result["memory"].items():
        mib = [f"{row[key] / 2**20:.0f}" for key in ("first_bytes", "last_bytes")]
        memory.add_row(name, *mib, f"{row['ratio']:.3f}", f"{row['max_bytes'] / 2**20:.0f}")
    console.print(memory)
    console.print("; ".join(result["broken"]) or "no bound is broken")


if __name__ == "__main__":
    main()
