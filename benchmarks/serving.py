"""Output tokens per second through HTTP: ours beside `transformers serve --continuous-batching`.

Both servers hold the same weights in float32 and are up at the same time; rounds alternate, so that whatever else the
machine does meets both. Run it with `python -m benchmarks.serving`.
"""

import argparse
import asyncio
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.load import Round, run_round
from benchmarks.servers import kajiya, transformers_serve
from cluster.catalog import find
from cluster.hardware import detect
from cluster.models.embedded import embedded_folder
from cluster.plan import plan_serving

MODEL = "smollm2-135m-instruct"
REQUIRED_RATIO = 0.8
"""Ours over the peer's median, at least."""


def main() -> None:
    """Measure, print the table, write the JSON; exit with 1 below `REQUIRED_RATIO`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    folder = embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = plan_serving(find(MODEL), detect())
    with ExitStack() as stack:
        urls = {"kajiya": (stack.enter_context(kajiya(MODEL)), MODEL)}
        peer = transformers_serve(
            folder, num_cached_tokens=plan.kv_cache_tokens, max_batch_tokens=plan.max_batch_tokens
        )
        urls["transformers serve"] = (stack.enter_context(peer), str(folder))
        rounds = measure(urls, num_rounds=arguments.rounds, num_streams=arguments.streams, max_tokens=arguments.tokens)
    result = summary(rounds, tokenizer)
    print_table(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(result["ratio"] < REQUIRED_RATIO)


def measure(
    urls: dict[str, tuple[str, str]], *, num_rounds: int, num_streams: int, max_tokens: int
) -> dict[str, list[Round]]:
    """Return the rounds of each server, after one round that does not count."""
    rounds: dict[str, list[Round]] = {name: [] for name in urls}
    for number in range(num_rounds + 1):
        for name, (url, model) in urls.items():
            measured = asyncio.run(run_round(url, model, num_streams=num_streams, max_tokens=max_tokens))
            if number:
                rounds[name].append(measured)
    return rounds


def summary(rounds: dict[str, list[Round]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return medians and spread; tokens are counted from the texts, the same way for every server."""
    servers: dict[str, dict[str, Any]] = {}
    for name, measured in rounds.items():
        speeds = [sum(len(ids) for ids in tokenizer(list(r.texts)).input_ids) / r.seconds for r in measured]
        servers[name] = {
            "tokens_per_s": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "median_first_s": statistics.median(r.median_first_s for r in measured),
            "rounds": speeds,
        }
    ours, peer = (servers[name]["tokens_per_s"] for name in rounds)
    answers = [measured[0].texts for measured in rounds.values()]
    same = sum(a == b for a, b in zip(*answers, strict=True))
    return {"servers": servers, "ratio": ours / peer, "same_answers": same, "num_answers": len(answers[0])}


def print_table(result: dict[str, Any]) -> None:
    """Print one line per server."""
    table = Table("server", "tokens/s", "lowest", "highest", "first text, s")
    for name, row in result["servers"].items():
        values = (row["tokens_per_s"], row["lowest"], row["highest"])
        table.add_row(name, *(f"{value:.1f}" for value in values), f"{row['median_first_s']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"ratio {result['ratio']:.2f} (at least {REQUIRED_RATIO}), "
        f"{result['same_answers']} of {result['num_answers']} greedy answers are the same text"
    )


if __name__ == "__main__":
    main()
