"""Searching beside the documented pattern, Ray Tune over Ray Train.

`python -m benchmarks.tuning [search asha entry gain]`. Each search is a process and a Ray of its own; the same points,
steps and data. `--predict GPU MODEL` prints what a pack should gain on a GPU, by arithmetic and bandwidth alone.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import pack_roofline
from benchmarks.adapter_files import MODEL
from benchmarks.child import run_module
from benchmarks.claims import Claim, Result, conclude, print_result
from benchmarks.load import spread
from benchmarks.tuning_alone import AloneNumbers
from benchmarks.tuning_search import MICRO_BATCH, SHIPPED, SearchNumbers, SearchSettings, more_points, points_of
from cluster.catalog import find
from cluster.memory import num_lora_parameters, weights_bytes

OURS, PEER = "kajiya", "Ray Tune + Ray Train"
MODULES = {OURS: "benchmarks.tuning_search", PEER: "benchmarks.tuning_peer"}
NUM_STEPS = 20
SCHEDULERS = {"search": "fifo", "asha": "asha"}
BOUNDS = {"search": 2.5, "asha": 4.0}
"""How many times shorter ours has to be."""
NUM_ALONE = 2
"""Trials that are trained again by themselves, to compare."""
AT_MOST_A_THIRD: Any = {"bound": 0.3, "direction": "at most"}
FIRST_STEP_BOUND_S = 2.0
EQUAL: Any = {"bound": 1e-5, "direction": "at most", "unit": "off"}
NUM_TRIALS = [1, 2, 4, 8, 16]
FEW_TOKENS = 64
"""Of a trial's step: up to here a run alone waits for memory, and a pack has to gain the most."""
TOKENS_PER_ROW = (16, 64, 128)
PREDICTED_TOKENS = (64, 256, 1024, 4096)


def main() -> None:
    """Measure, print the tables, write the JSON; exit with 1 when a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = (*SCHEDULERS, "entry", "gain")
    parser.add_argument("measurements", nargs="*", metavar="|".join(wanted), help="all by default")
    parser.add_argument("--trials", type=int, default=16, choices=(2, 4, 8, 16), help="of each search")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--predict", nargs=2, metavar=("GPU", "MODEL"))
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.measurements) - set(wanted)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(wanted)}")
    console = Console()
    if arguments.predict:
        gpu, model = arguments.predict
        predict(gpu, model, console)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    begin = time.perf_counter()
    results: dict[str, Result] = {}
    for name in arguments.measurements or wanted:
        for title, result in measured(name, arguments.trials):
            results[title] = result
            print_result(title, result, console)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")
    conclude(results, console, arguments.json)


def measured(name: str, num_trials: int) -> Iterator[tuple[str, Result]]:
    """Yield each title of what is measured under `name`, with its result, as soon as it is there."""
    match name:
        case "gain":
            yield from gains()
        case "entry":
            yield name, entry()
        case _:
            yield name, compare(name, num_trials)


def entry() -> Result:
    """Return how long trials of ours wait for their first step once there is a place for them."""
    with TemporaryDirectory(prefix="kajiya-bench-") as folder:
        settings = settings_of("asha", more_points(), Path(folder))
        ours = SearchNumbers(**run_module(MODULES[OURS], json.dumps(asdict(settings))))
    first, num_waiting = spread(ours.first_step_s), len(ours.first_step_s)
    return Result(
        numbers={"from a free place to a first step made": first, "until that step begins": spread(ours.begun_s)},
        unit="s",
        claims=(
            Claim(
                what=f"from a free place to a first step, median of {num_waiting} trials",
                measured=float(first["median"]),  # type: ignore[arg-type]
                bound=FIRST_STEP_BOUND_S,
                direction="at most",
                unit="s",
            ),
        ),
        notes=(f"asha, {len(settings.points) - num_waiting} trials at a time on one base; {num_waiting} wait.",),
    )


def compare(name: str, num_trials: int) -> Result:
    """Return what one search of each takes."""
    with TemporaryDirectory(prefix="kajiya-bench-") as folder:
        settings = settings_of(SCHEDULERS[name], points_of(num_trials), Path(folder))
        found = {}
        for who, module in MODULES.items():
            found[who] = SearchNumbers(**run_module(module, json.dumps(asdict(settings))))
            print(f"{who}: {found[who].seconds:.0f} s", flush=True)  # minutes pass before there is a table
    ours, peer = found[OURS], found[PEER]
    alone = [AloneNumbers(**run_module("benchmarks.tuning_alone", json.dumps(one))) for one in _asked_alone(ours)]
    off = max(_difference(numbers, run.losses) for numbers, run in zip(ours.losses, alone, strict=False))
    copies = len(ours.points) * max(run.peak_bytes for run in alone)
    return Result(
        numbers={
            **{f"{who}, s": spread([numbers.seconds]) for who, numbers in found.items()},
            **{f"{who}, peak of all processes, GiB": spread([n.peak_bytes / 2**30]) for who, n in found.items()},
            **{f"{who}, best held-out loss": spread([min(n.held_out_losses)]) for who, n in found.items()},
            **{f"{who}, steps of all trials": spread([float(sum(n.num_steps))]) for who, n in found.items()},
            "one trial alone, all threads, tokens/s": spread([run.tokens_per_s for run in alone]),
            f"{PEER}, from a free place to a first step, s": spread(peer.first_step_s or [float("nan")]),
        },
        unit="as named",
        claims=(
            Claim(
                what=f"{num_trials} trials, {SCHEDULERS[name]}: the peer's time over ours",
                measured=peer.seconds / ours.seconds,
                bound=BOUNDS[name],
                direction="at least",
            ),
            Claim(what="peak memory over as many separate runs", measured=ours.peak_bytes / copies, **AT_MOST_A_THIRD),
            Claim(what="a loss beside that of the same run alone", measured=off, **EQUAL),
        ),
    )


def _asked_alone(ours: SearchNumbers) -> list[dict[str, Any]]:
    # The first trials of the lists: all of them take as long as the search.
    points = list(zip(ours.points, ours.losses, strict=True))[:NUM_ALONE]
    return [{"model": MODEL, "point": point, "num_steps": NUM_STEPS} for point, _ in points]


def _difference(losses: Sequence[float], alone: Sequence[float]) -> float:
    """Return the largest difference of two runs over the steps that both made."""
    return max(abs(one - other) for one, other in zip(losses, alone, strict=False))


def settings_of(scheduler: str, points: list[dict[str, Any]], folder: Path) -> SearchSettings:
    """Return what both search, the samples of the peer tokenized as ours are."""
    from benchmarks.tuning_data import write_samples
    from cluster.models.embedded import embedded_folder
    from cluster.presets import LEARNING_RATES
    from tune_spaces.halving import rungs
    from tune_spaces.methods import REDUCTION_FACTOR
    from tune_spaces.run import FIRST_RUNG_SHARE

    num_warmup_steps, _ = LEARNING_RATES["lora"].clamp(NUM_STEPS)
    first = max(num_warmup_steps + 1, -(-NUM_STEPS // FIRST_RUNG_SHARE))
    halving = rungs(NUM_STEPS, first=first, reduction_factor=REDUCTION_FACTOR)
    return SearchSettings(
        model=MODEL,
        model_folder=str(embedded_folder()),
        data=str(write_samples(SHIPPED, folder)),
        scheduler=scheduler,
        num_steps=NUM_STEPS,
        num_warmup_steps=num_warmup_steps,
        rungs=list(halving) if scheduler == "asha" else [NUM_STEPS],
        reduction_factor=REDUCTION_FACTOR,
        points=points,
    )


def gains() -> Iterator[tuple[str, Result]]:
    """Yield the speed of packs of each size, by tokens of a row and precision."""
    for precision in ("fp32", "nf4"):
        for tokens_per_row in TOKENS_PER_ROW if precision == "fp32" else TOKENS_PER_ROW[:1]:
            settings = {
                "model": MODEL,
                "precision": precision,
                "micro_batch_size": MICRO_BATCH,
                "tokens_per_row": tokens_per_row,
                "num_trials": NUM_TRIALS,
                "num_steps": 5 if MICRO_BATCH * tokens_per_row <= FEW_TOKENS else 3,
                "num_rounds": 3,
                "num_threads": os.cpu_count() or 1,
            }
            measured_rates = run_module("benchmarks.tuning_gain", json.dumps(settings))
            rates = {int(count): of_rounds for count, of_rounds in measured_rates.items()}
            num_tokens = MICRO_BATCH * tokens_per_row
            yield f"{precision}, {num_tokens} tokens a step", gain_result(rates, precision, num_tokens)


def gain_result(rates: dict[int, list[float]], precision: str, num_tokens: int) -> Result:
    """Return the speeds `rates` of each round by number of trials, and what the largest pack has to reach."""
    most = max(rates)
    gains_ = spread([pack / alone for alone, pack in zip(rates[1], rates[most], strict=True)])
    return Result(
        numbers={f"{count} trials": spread(of_rounds) for count, of_rounds in rates.items()},
        unit="trained tokens/s",
        claims=(
            Claim(
                what=f"{most} trials over one alone, {precision}, {num_tokens} tokens a step",
                measured=float(gains_["median"]),  # type: ignore[arg-type]
                bound=1.8 if num_tokens <= FEW_TOKENS else 1.0,
                direction="at least",
            ),
        ),
        notes=(f"{most} trials over one alone in each round: {gains_['lowest']:.2f} to {gains_['highest']:.2f}.",),
    )


def predict(gpu: str, model: str, console: Console) -> None:
    """Print the gain of packs on a GPU that is not here."""
    if gpu not in pack_roofline.ACCELERATORS:
        raise SystemExit(f"There are no rates for {gpu!r}; choose from {', '.join(pack_roofline.ACCELERATORS)}.")
    card = find(model)
    work = pack_roofline.Work(
        base_parameters=card.num_linear_parameters(),
        base_bytes=weights_bytes(card, "bf16"),
        adapter_parameters=num_lora_parameters(card, r=16),
    )
    table = Table(f"{model} in bf16, r=16, on {gpu}", *(f"{count} trials" for count in NUM_TRIALS[1:]))
    accelerator = pack_roofline.ACCELERATORS[gpu]
    for num_tokens in PREDICTED_TOKENS:
        gains_ = (
            pack_roofline.gain(work, accelerator, num_tokens=num_tokens, num_trials=count) for count in NUM_TRIALS[1:]
        )
        table.add_row(f"{num_tokens:,} tokens a step", *(f"{gain:.2f} x" for gain in gains_))
    console.print(table)
    console.print("A prediction from the data sheet's rates, which no run reaches; not measured.")


if __name__ == "__main__":
    main()
