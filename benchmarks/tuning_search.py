"""One search in a process of its own: `python -m benchmarks.tuning_search '{...}'` prints its numbers."""

import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import peak_of_processes

SHIPPED = Path(__file__).parent.parent / "examples" / "tsuchineya_faq"
SPACE: dict[str, tuple[float, ...]] = {"r": (4, 8, 32, 64), "lora_alpha": (16, 32), "learning_rate": (2e-4, 1e-3)}
MORE_RATES = (2e-4, 5e-4, 1e-3)
"""With these, the space has half as many points again as a worker has slots: trials have to wait for a place."""
MICRO_BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """What is searched, the same for both."""

    model: str
    model_folder: str
    data: str
    """A JSON file of tokenized samples, for the peer."""
    scheduler: str
    num_steps: int
    num_warmup_steps: int
    rungs: list[int]
    reduction_factor: int
    points: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchNumbers:
    """What came of it."""

    seconds: float
    """From the start of the driver, Ray's included, to the last result."""
    first_step_s: list[float]
    """From a free place until the trial that takes it has made its first step."""
    begun_s: list[float]
    """The same until that step begins."""
    peak_bytes: int
    """Of all processes together."""
    points: list[dict[str, Any]]
    """In the order of the lists below."""
    num_steps: list[int]
    held_out_losses: list[float]
    losses: list[list[float]]
    """Of each step."""


def points_of(num_trials: int) -> list[dict[str, Any]]:
    """Return the points of the grid, spread over it where there are fewer trials than points."""
    grid = _grid(SPACE)
    return grid[:: len(grid) // num_trials][:num_trials]


def more_points() -> list[dict[str, Any]]:
    """Return more points than there are slots."""
    return _grid({**SPACE, "learning_rate": MORE_RATES})


def _grid(space: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def search(settings: SearchSettings, folder: Path) -> SearchNumbers:
    """Search as `kajiya tune` does, with a registry and a state of this run alone."""
    from cluster.home import kajiya_home

    begin = time.time()
    home = folder / "home"
    home.mkdir()
    (home / "models").symlink_to(kajiya_home() / "models")
    os.environ["KAJIYA_HOME"] = str(home)
    os.environ.pop("KAJIYA_REGISTRY", None)
    # Ray is imported here: one trial alone, which is measured too, goes without.
    from benchmarks.tuning_watch import ClockedWatch
    from tune_spaces import tuner
    from tune_spaces.search import start

    tuner.Watch = ClockedWatch  # type: ignore[attr-defined]
    with peak_of_processes() as peak:
        start(_arguments(settings))
        seconds = time.time() - begin
    results = [_lines(path) for path in sorted(home.glob("searches/*/*/result.json"))]
    return SearchNumbers(
        seconds=seconds,
        first_step_s=ClockedWatch.clock.first_step_s,
        begun_s=ClockedWatch.clock.begun_s,
        peak_bytes=peak.num_bytes,
        points=[{field: lines[-1]["config"][field] for field in SPACE} for lines in results],
        num_steps=[lines[-1]["step"] for lines in results],
        held_out_losses=[lines[-1]["held_out_loss"] for lines in results],
        losses=[[loss for line in lines for loss in line["losses"]] for lines in results],
    )


def _arguments(settings: SearchSettings) -> list[str]:
    space = {field: {str(point[field]) for point in settings.points} for field in SPACE}
    changes = [f"--set-space={field}={','.join(sorted(values))}" for field, values in space.items()]
    preset = ["micro_batch_size=4", "gradient_accumulation_steps=1"]
    return [
        *("--model", settings.model, "--name", "bench", "--no-baseline", *changes),
        *("--data", str(SHIPPED / "train.jsonl"), "--eval-data", str(SHIPPED / "heldout.jsonl")),
        *("--searcher", "grid", "--scheduler", settings.scheduler, "--max-steps", str(settings.num_steps)),
        *(f"--set={value}" for value in preset),
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Run and print the numbers as the last line."""
    settings = SearchSettings(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="kajiya-bench-") as folder:
        print(json.dumps(asdict(search(settings, Path(folder)))))


if __name__ == "__main__":
    main()
