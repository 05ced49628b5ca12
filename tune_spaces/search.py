"""Search hyperparameters with many trials on one base, and register the best adapter.

ray job submit -- python -m tune_spaces.search --model smollm2-135m-instruct --data chats.jsonl --name support
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.catalog import find
from cluster.hardware import detect
from cluster.hub import ensure_available
from cluster.plan import TrainingPlan
from cluster.registry import AdapterVersion, check_name
from train_jobs.command_line import run_command
from train_jobs.data import check_beginning
from train_jobs.progress import announce
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.trial_plan import plan_trials
from tune_spaces.values import BadSpace, Choice

if TYPE_CHECKING:
    from train_jobs.prepare import Data


def search(request: SearchRequest, *, resume: str | None = None) -> AdapterVersion:
    """Plan, check, try, and register the best; returns the new version.

    Raises:
        UserError: Whatever the user can put right; all that is wrong with the request itself comes before a base is
            loaded.
    """
    plan = check(request)
    # From here on it takes seconds: torch, transformers and Ray are imported.
    from train_jobs.prepare import read_data, tell_acceptance, train_samples
    from tune_spaces.run import as_training_request, run_search

    data = read_data(as_training_request(request), plan)
    if "exact_match" in request.objectives and not data.questions:
        raise BadSpace(
            f"--objective exact_match counts right answers, and no held-out dialogue of "
            f"{request.eval_data or request.data} ends in one; use held_out_loss."
        )
    shorter: set[int] = set()
    if "max_length" in request.changes:
        trials = plan_trials(request, plan.hardware)
        lengths = trials.space["max_length"]  # those that fit
        assert isinstance(lengths, Choice)
        shorter = {int(length) for length in lengths.values} - {plan.max_length}
    else:
        trials = plan_trials(replace(request, max_length=longest(data)), plan.hardware)
    samples = {trials.plan.max_length: data.train.samples}
    for length in sorted(shorter):
        samples[length] = train_samples(as_training_request(request), replace(plan, max_length=length))
    tell_acceptance(trials.plan)
    if trials.left_out:
        announce("warning", trials.left_out)
    if trials.alone_because:
        announce("fallback", f"each trial is a training run of its own: {trials.alone_because}")
    return run_search(request, trials, data, samples, resume=resume)


def check(request: SearchRequest) -> TrainingPlan:
    """Return the plan of one trial, once all that is cheap to check has been checked.

    Raises:
        UserError: Model, name, space, or data are not what can be searched.
    """
    card = find(request.model)
    check_name(request.name)
    plan = plan_trials(request, detect()).plan
    for path in filter(None, (request.data, request.eval_data)):
        check_beginning(path)
    ensure_available(card)
    return plan


def longest(data: "Data") -> int:
    """Return the tokens of the longest sample: room for longer ones would only keep trials out of memory."""
    return max(part.longest for part in (data.train, data.held_out))


def start(argv: Sequence[str]) -> AdapterVersion:
    """Start the search that `argv` asks for, or go on with one."""
    asked = read_arguments(argv)
    if isinstance(asked, str):
        from tune_spaces.store import load_request

        return search(load_request(asked), resume=asked)
    return search(asked)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return run_command(start, argv, when_stopped="go on with --resume")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
