"""Which trial of a search is kept, and which one has the plan's own values."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Result

from cluster.errors import UserError
from tune_spaces.arguments import SearchRequest
from tune_spaces.control import has_values
from tune_spaces.objectives import badness, chosen
from tune_spaces.trial import DIVERGED_LOSS
from tune_spaces.trial_jobs import ADAPTER_FOLDER


class NothingFound(UserError, RuntimeError):
    """No trial came far enough to be kept."""


def best_of(results: Sequence[Result], request: SearchRequest, *, errors: Iterable[Exception] = ()) -> Result:
    """Return the trial to register: `objectives.chosen` of those that reported and kept their adapter; of equals, the
    one that trained longest.

    Raises:
        NothingFound: There is none.
    """
    trials = sorted(sound(results, request.objectives), key=lambda result: -result.metrics["step"])
    if not trials:
        texts = [str(error).splitlines()[-1] for error in errors]
        why = texts[0] if texts else "the budget ended, or every loss diverged"
        raise NothingFound(f"No trial reached its first report: {why}. Give more time, or smaller learning rates.")
    points = [badness(request.objectives, result.metrics) for result in trials]
    return trials[chosen(points, within=request.within)]


def sound(results: Iterable[Result], objectives: Sequence[str]) -> list[Result]:
    """Return the trials that reported every objective, did not diverge and kept their adapter."""
    return [
        result
        for result in results
        if result.checkpoint is not None
        and all(name in (result.metrics or {}) for name in objectives)
        and result.metrics["held_out_loss"] < DIVERGED_LOSS
    ]


def baseline_of(results: Iterable[Result], guess: Mapping[str, Any]) -> Result | None:
    """Return the trial with the plan's own values, `guess`, if it kept its adapter."""
    trials = [result for result in results if has_values(result.config or {}, guess)]
    return next((trial for trial in trials if trial.checkpoint is not None), None)


def adapter_files(result: Result) -> dict[str, bytes]:
    """Return the adapter that the trial kept, as the files of PEFT's format."""
    with result.checkpoint.as_directory() as folder:
        return {path.name: path.read_bytes() for path in (Path(folder) / ADAPTER_FOLDER).iterdir()}
