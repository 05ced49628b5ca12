"""Ray Tune over the slots of the pack workers: a new search, or one that goes on after a crash."""

import logging
import os
import random
from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, Tuner

from tune_spaces.arguments import SearchRequest
from tune_spaces.launched_trial import LaunchedTrial
from tune_spaces.methods import scheduler, searcher
from tune_spaces.packed_trial import Farewell, PackedTrial
from tune_spaces.shared import Shared
from tune_spaces.values import Space, to_ray
from tune_spaces.watch import Outline, Recall, Watch

MAX_FAILURES = 3
"""How often a trial may lose its worker."""
NUM_TO_CLONE = 3
"""Checkpoints that each trial keeps for population-based training, which may clone one when the next is there."""
RAY_ENV = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables; Watch says what there is to say
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what a crash of the driver may undo
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search as if it had come to its end
}


def quiet_ray() -> None:
    """Let Ray Tune say nothing that `Watch` says better."""
    os.environ.update(RAY_ENV)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def tuner(
    request: SearchRequest,
    space: Space,
    shared: Shared,
    outline: Outline,
    *,
    first_guess: Mapping[str, Any],
) -> Tuner:
    """Return Ray's tuner for the search; where Ray has the state of a search that was cut short, it goes on there."""
    random.seed(request.seed)  # which population-based training draws from
    trial_scheduler = scheduler(
        request.scheduler,  # type: ignore[arg-type] # argparse checked it
        space,
        rungs=shared.rungs,
        control=first_guess if request.baseline else None,
    )
    # What population-based training decided it has written into the trials themselves.
    recalled = () if request.scheduler == "pbt" else outline.reports
    is_packed = shared.launch is None
    kind = PackedTrial if is_packed else LaunchedTrial
    # A trial only waits, for its worker or its run: where those and what is served have all CPUs, the smallest part of
    # one would be missing.
    trainable = tune.with_resources(tune.with_parameters(kind, shared=shared), {"memory": 1})
    new = Tuner(
        trainable,
        param_space=to_ray(space),
        tune_config=tune.TuneConfig(
            metric=request.objective,
            mode=request.mode,
            num_samples=outline.num_trials,
            search_alg=searcher(
                request.searcher,  # type: ignore[arg-type] # argparse checked it
                space,
                first_guess=first_guess,
                max_concurrent=outline.packs.num_trials,
                seed=request.seed,
            ),
            scheduler=trial_scheduler,
            time_budget_s=outline.left_s,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=outline.name,
            storage_path=str(outline.folder.parent),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(
                num_to_keep=NUM_TO_CLONE if request.scheduler == "pbt" else 1,
                checkpoint_frequency=1,
                checkpoint_at_end=True,
            ),
            callbacks=[Recall(trial_scheduler, recalled), Watch(outline), *([Farewell()] if is_packed else [])],
            verbose=0,
        ),
    )
    if not any(outline.folder.glob("experiment_state-*.json")):
        return new
    # Ray takes scheduler, callbacks and time budget from the file that `new` has just written, the rest from the crash.
    return Tuner.restore(str(outline.folder), trainable=trainable, resume_unfinished=True, restart_errored=True)
