"""Training beside TRL's `SFTTrainer` as it comes: `python -m benchmarks.training`.

Each run is a process of its own; the two take turns. Same dialogues, batches and adapters, SmolLM2 in float32.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.adapter_files import MODEL
from benchmarks.child import run_module
from benchmarks.claims import Claim, Result, conclude, print_result
from benchmarks.dialogues import mixed_dialogues
from benchmarks.load import spread
from benchmarks.training_run import RunNumbers, RunSettings
from cluster.catalog import find
from cluster.models.embedded import embedded_folder
from train_jobs.allocator import WORKER_ENV

OURS, TRL = "kajiya", "trl"
SHIPPED = Path(__file__).parent.parent / "examples" / "tsuchineya_faq" / "train.jsonl"
FLOP_PER_PARAMETER = 4
"""Of a token under LoRA: a multiplication and an addition forwards, and the same for the gradient of the activation.
The head is counted for every token, though only labels need it."""


def main() -> None:
    """Measure, print the tables, write the JSON; exit with 1 when a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each run; the first one is not timed")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed; get it with: pip install --no-deps trl==1.16.0")
    os.environ["HF_HUB_OFFLINE"] = "1"
    console, begin = Console(), time.perf_counter()
    results: dict[str, Result] = {}
    with TemporaryDirectory(prefix="kajiya-bench-") as folder:
        for name, data in {"shipped data set": SHIPPED, "40 to 200 tokens": write_mixed(Path(folder))}.items():
            settings = RunSettings(
                model=MODEL, data=str(data), batch_size=8, num_steps=arguments.steps, num_threads=os.cpu_count() or 1
            )
            results[name] = compare(alternate(settings, arguments.rounds))
            print_result(name, results[name], console)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")
    conclude(results, console, arguments.json)


def write_mixed(folder: Path) -> Path:
    """Write 96 dialogues of 40 to 200 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    path = folder / "mixed.jsonl"
    dialogues = mixed_dialogues(tokenizer, count=96, shortest=40, longest=200)
    path.write_text("".join(json.dumps({"messages": dialogue}) + "\n" for dialogue in dialogues))
    return path


def alternate(settings: RunSettings, num_rounds: int) -> dict[str, list[RunNumbers]]:
    """Return the runs of both, one of each in turn."""
    runs: dict[str, list[RunNumbers]] = {OURS: [], TRL: []}
    for _ in range(num_rounds):
        for name, numbers in runs.items():
            environment = WORKER_ENV if name == OURS else {}  # as the workers of each begin
            found = run_module("benchmarks.training_run", name, json.dumps(asdict(settings)), environment=environment)
            numbers.append(RunNumbers(**found))
    return runs


def compare(runs: dict[str, list[RunNumbers]]) -> Result:
    """Return speeds, peaks and the share of the machine's float32 rate, and what follows from them."""
    flop = FLOP_PER_PARAMETER * find(MODEL).num_parameters()
    speeds = {name: [run.tokens_per_s for run in numbers] for name, numbers in runs.items()}
    peaks = {name: [run.peak_bytes / 2**30 for run in numbers] for name, numbers in runs.items()}
    shares = [run.tokens_per_s * flop / run.matmul_flop_per_s for run in runs[OURS]]
    of_ours = [run.tokens_per_s * flop / (run.own_flop_per_s or math.nan) for run in runs[OURS]]
    speed, peak = (statistics.median(values[OURS]) / statistics.median(values[TRL]) for values in (speeds, peaks))
    return Result(
        numbers={
            **{f"{name}, tokens/s": spread(values) for name, values in speeds.items()},
            **{f"{name}, peak, GiB": spread(values) for name, values in peaks.items()},
            f"{OURS}, share of torch's fp32 rate": spread(shares),
            f"{OURS}, share of the rate of its own products": spread(of_ours),
        },
        unit="as named",
        claims=(
            Claim(what="trained tokens/s over TRL's", measured=speed, bound=2.5, direction="at least"),
            Claim(what="peak memory over TRL's", measured=peak, bound=0.5, direction="at most"),
            Claim(
                what="share of torch's fp32 rate",
                measured=statistics.median(shares),
                bound=0.75,
                direction="at least",
                unit="of it",
            ),
        ),
    )


if __name__ == "__main__":
    main()
