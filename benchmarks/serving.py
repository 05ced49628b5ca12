"""Serving beside its peers: `python -m benchmarks.serving [throughput adapters overhead registry start]`.

All servers of a measurement are up at once and hold the same weights in float32; rounds alternate, so that whatever
else the machine does meets all of them, and those that are not asked are idle.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from benchmarks import adapters, overhead, registry_size, start, throughput
from benchmarks.adapter_files import MODEL
from benchmarks.bench import Bench, bench
from benchmarks.claims import Result, conclude, print_result
from benchmarks.servers import run_kajiya, serve_instance

ON_ONE_APPLICATION = {
    "throughput": throughput.measure,
    "adapters": adapters.measure,
    "overhead": overhead.measure,
    "registry": registry_size.measure,
}
"""In this order: the registry grows in the last."""
ALL = (*ON_ONE_APPLICATION, "start")


def main() -> None:
    """Measure, print the tables, write the JSON; exit with 1 when a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", metavar="|".join(ALL), help="all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    wanted = arguments.measurements or list(ALL)
    if unknown := sorted(set(wanted) - set(ALL)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(ALL)}")
    console = Console()
    begin = time.perf_counter()
    with bench(num_rounds=arguments.rounds, num_streams=arguments.streams, max_tokens=arguments.tokens) as run:
        results = measure(run, wanted, console)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")
    conclude(results, console, arguments.json)


def measure(run: Bench, wanted: list[str], console: Console) -> dict[str, Result]:
    """Return the results of what is wanted; each is printed as soon as it is there."""
    results: dict[str, Result] = {}
    together = [name for name in ON_ONE_APPLICATION if name in wanted]
    with serve_instance() if together else nullcontext("") as url:
        if together:
            assert run.adapters  # written before anything is timed
            run.kajiya_url = run_kajiya(MODEL)
            run.serve_url = url
        for name in together:
            results[name] = ON_ONE_APPLICATION[name](run)
            print_result(name, results[name], console)
    if "start" in wanted:
        results["start"] = start.measure(run)
        print_result("start", results["start"], console)
    return results


if __name__ == "__main__":
    main()
