"""Memory while more and more dialogues are tokenized and trained on: `python -m benchmarks.streaming`.

Each size is a process and a Ray of its own: it writes short dialogues, tokenizes them as `kajiya train` does, trains a
few steps with two workers, and notes the peak resident memory of every process. The model is tiny, so that data would
be seen beside it; the tokenizer is SmolLM2's.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.child import run_module
from benchmarks.claims import Claim, print_claims

MIB = 2**20
SIZES = (10_000, 100_000, 1_000_000)
MAX_GROWTH = 1.25
"""From the smallest to the largest size; a sample may cost a worker some bytes for its place, never its tokens."""
PROCESSES = {
    "driver": "driver",
    "reader": "MapBatches(_read)",
    "tokenizer": "MapBatches(_Tokenizer)",
    "training worker": "RayTrainWorker",
}
"""What they are called in a table, and what is in the name of the process."""


def measure(num_samples: int) -> dict[str, float]:
    """Return the numbers of one size."""
    numbers: dict[str, float] = run_module("benchmarks.streaming_run", str(num_samples))
    return numbers


def print_sizes(measured: dict[int, dict[str, float]], console: Console) -> None:
    """Print a row per number and a column per size."""
    table = Table("", *(f"{size:,} dialogues" for size in measured))
    for name in dict.fromkeys(name for numbers in measured.values() for name in numbers):
        table.add_row(name, *(f"{numbers[name]:,.4g}" if name in numbers else "–" for numbers in measured.values()))
    console.print(table)


def claims(measured: dict[int, dict[str, float]]) -> list[Claim]:
    """Return whether the peaks of the largest size are near those of the smallest that used the process."""
    (first, *_, last) = measured.values()
    return [
        Claim(
            what=f"peak of the {name}, {max(measured):,} over {min(measured):,} dialogues",
            measured=last[f"{name}, MiB"] / first[f"{name}, MiB"],
            bound=MAX_GROWTH,
            direction="at most",
        )
        for name in PROCESSES
        if f"{name}, MiB" in first and f"{name}, MiB" in last
    ]


def main() -> int:
    """Measure every size that is asked for; 1 when a claim is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="dialogues, the smallest size first")
    console = Console()
    measured: dict[int, dict[str, float]] = {}
    for size in parser.parse_args().sizes:
        measured[size] = measure(size)
        print_sizes(measured, console)
    found = claims(measured) if len(measured) > 1 else []
    print_claims(found, console)
    return 0 if all(claim.is_met for claim in found) else 1


if __name__ == "__main__":
    sys.exit(main())
