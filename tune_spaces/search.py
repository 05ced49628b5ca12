"""Search hyperparameters with many trials on one base, and register the best adapter.

ray job submit -- python -m tune_spaces.search --model smollm2-135m-instruct --data chats.jsonl --name support
"""

import sys
from collections.abc import Sequence

from cluster.catalog import find
from cluster.errors import UserError
from cluster.hardware import detect
from cluster.hub import ensure_available
from cluster.plan import TrainingPlan, plan_training
from cluster.registry import AdapterVersion, check_name
from train_jobs.data import read_data_file
from train_jobs.interrupt import treat_sigterm_as_ctrl_c
from train_jobs.progress import announce
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.pack_plan import PackPlan, plan_packs, prune
from tune_spaces.spaces import space_of
from tune_spaces.values import Choice, Space


def search(request: SearchRequest, *, resume: str | None = None) -> AdapterVersion:
    """Plan, check, try, and register the best; returns the new version.

    Raises:
        UserError: Whatever the user can put right; all that is wrong with the request itself comes before a base is
            loaded.
    """
    card = find(request.model)
    check_name(request.name)
    plan = plan_of(request)
    space, packs = space_and_packs(request, plan)
    for path in filter(None, (request.data, request.eval_data)):
        read_data_file(path)
    ensure_available(card)

    # From here on it takes seconds: torch, transformers and Ray are imported.
    from tune_spaces.run import run_search

    return run_search(request, plan, space, packs, resume=resume)


def plan_of(request: SearchRequest) -> TrainingPlan:
    """Return the plan of one trial by itself."""
    return plan_training(
        find(request.model),
        detect(),
        method=request.method or "lora",
        precision=request.precision,
        overrides=request.overrides,
        max_length=request.max_length,
        num_workers=1,
    )


def space_and_packs(request: SearchRequest, plan: TrainingPlan) -> tuple[Space, PackPlan]:
    """Return what is tried, without what does not fit, and how many at a time.

    Raises:
        BadSpace, DoesNotFit: Nothing is left to try.
    """
    space, left_out = prune(space_of(request.space, plan, request.changes), plan, num_workers=request.num_workers)
    if left_out:
        announce("warning", left_out)
    ranks = space.get("r")
    assert plan.lora is not None
    max_r = max(int(r) for r in ranks.values) if isinstance(ranks, Choice) else plan.lora.r
    packs = plan_packs(plan, max_r=max(max_r, plan.lora.r), num_trials=request.trials, num_workers=request.num_workers)
    return space, packs


def main(argv: Sequence[str]) -> int:
    """Run the command; an error of the user's is one line on stderr and exit code 2, `--debug` shows where."""
    treat_sigterm_as_ctrl_c()
    try:
        asked = read_arguments(argv)
        if isinstance(asked, str):
            from tune_spaces.store import load_request

            search(load_request(asked), resume=asked)
        else:
            search(asked)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: stopped; go on with --resume", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
