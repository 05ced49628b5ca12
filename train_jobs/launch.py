"""Run a job on Ray Train's workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from cluster.errors import UserError
from train_jobs.allocator import WORKER_ENV
from train_jobs.connection import connect
from train_jobs.interrupt import treat_sigterm_as_ctrl_c
from train_jobs.job import TrainJob
from train_jobs.loop import OUTCOME, Outcome
from train_jobs.progress import announce
from train_jobs.run_store import RunStore
from train_jobs.token_carrier import carried
from train_jobs.worker import Assignment, Refusal, train_loop

MAX_FAILURES = 3
"""How many deaths of workers a run survives."""
RESIZE_INTERVAL_S = 300.0
"""How often a run with room for more workers takes them; it then begins again at its last checkpoint."""
CPUS_PER_WORKER = 1


class TrainingRunError(UserError, RuntimeError):
    """The workers could not finish the job."""


class TooFewResourcesError(UserError, RuntimeError):
    """The cluster will never have what the job needs."""


class RunRefused(UserError, RuntimeError):
    """What a worker refused, and would refuse again."""


class RunDiverged(RunRefused):
    """A run whose loss is no number any more."""


class UnfinishedError(UserError, RuntimeError):
    """A run that could not end, and may another time."""


@contextmanager
def kept_until_registered(run: RunStore) -> Iterator[None]:
    """Delete `run` when all has ended well, or when there is nothing in it that is worth going on with."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, RunRefused) and (run.steps() or run.read_result() is not None):
            announce("kept", f"{run.uri} is kept: go on with --resume {run.run}, or delete it.", run=run.run)
        else:
            run.delete()
        raise
    run.delete()


def launch(job: TrainJob, run: RunStore, *, num_workers: int, use_gpu: bool, min_workers: int | None = None) -> Outcome:
    """Return the outcome of `job`, whose adapters are then in the result of `run`; nothing is trained again.

    With `min_workers`, the run begins and goes on with as many workers as there is room for.

    Raises:
        RunRefused, RunDiverged: What a worker refused, in its words.
        UnfinishedError: The result could not be written.
        TrainingRunError: Workers died more than `MAX_FAILURES` times, or raised what is no `UserError`.
        TooFewResourcesError: More workers than the cluster has cores or GPUs for.
    """
    if (kept := run.read_result()) is not None:
        return OUTCOME.validate_json(kept)
    connect()
    treat_sigterm_as_ctrl_c()
    _ensure_resources(min_workers or num_workers, use_gpu=use_gpu)
    job = carried(job)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"assignment": Assignment(job=job, run=run, num_workers=num_workers)},
        scaling_config=ScalingConfig(
            num_workers=num_workers if min_workers is None else (min_workers, num_workers),
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            use_gpu=use_gpu,
            resources_per_worker=_resources(use_gpu=use_gpu),
        ),
        run_config=RunConfig(
            name=run.run,
            storage_path=run.root,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            worker_runtime_env={"env_vars": WORKER_ENV},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingRunError(f"Training failed: {_last_line(error)}") from error
    except SystemExit:  # Ray Train's answer to Ctrl-C, with exit code 0
        raise KeyboardInterrupt from None
    if isinstance(result.return_value, Refusal):
        raise _error_of(result.return_value)
    if not isinstance(result.return_value, Outcome):  # an aborted run ends without a value
        raise KeyboardInterrupt
    return result.return_value


def _error_of(refusal: Refusal) -> UserError:
    if refusal.can_resume:
        return UnfinishedError(refusal.message)
    return RunDiverged(refusal.message) if refusal.is_diverged else RunRefused(refusal.message)


def _resources(*, use_gpu: bool) -> dict[str, int]:
    return {"CPU": CPUS_PER_WORKER} | ({"GPU": 1} if use_gpu else {})


def _ensure_resources(num_workers: int, *, use_gpu: bool) -> None:
    for kind, each in _resources(use_gpu=use_gpu).items():
        there = ray.cluster_resources().get(kind, 0)
        if there < num_workers * each:
            raise TooFewResourcesError(
                f"{num_workers} workers need {num_workers * each} {kind}s; the Ray cluster has {there:g}. "
                f"Use --num-workers {max(1, int(there // each))}, or add a node."
            )


def _last_line(error: TrainingFailedError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
