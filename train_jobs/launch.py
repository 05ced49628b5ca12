"""Run a job on Ray Train's workers."""

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from cluster.errors import UserError
from cluster.home import make_home_folder
from train_jobs.interrupt import treat_sigterm_as_ctrl_c
from train_jobs.job import TrainJob
from train_jobs.loop import Outcome
from train_jobs.worker import Refusal, train_loop

MAX_FAILURES = 3
"""How many deaths of workers a run survives."""
CPUS_PER_WORKER = 1

# A training step frees and asks for the same large tensors again and again. By default glibc gives memory back to the
# system each time and pays with page faults: a tenth of a step on a CPU.
WORKER_ENV = {"MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_MMAP_THRESHOLD_": "33554432"}


class TrainingRunError(UserError, RuntimeError):
    """The workers could not finish the job."""


class TooFewResourcesError(UserError, RuntimeError):
    """The cluster will never have what the job needs."""


@contextmanager
def run_folder(name: str) -> Iterator[Path]:
    """Yield a new folder for the checkpoints of a run, gone when the run has ended, well or not.

    Raises:
        HomeNotWritable: It cannot be made.
    """
    folder = make_home_folder("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def launch(job: TrainJob, folder: Path, *, num_workers: int, use_gpu: bool) -> tuple[Outcome, Path]:
    """Return the outcome of `job` and the folder of its last checkpoint, in `folder`.

    Raises:
        UserError: What a worker refused, in its words.
        TrainingRunError: Workers died more than `MAX_FAILURES` times, or raised what is no `UserError`.
        TooFewResourcesError: More workers than the cluster has cores or GPUs for.
    """
    ray.init(ignore_reinit_error=True)
    treat_sigterm_as_ctrl_c()
    _ensure_resources(num_workers, use_gpu=use_gpu)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=_resources(use_gpu=use_gpu)
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
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
        raise UserError(result.return_value.message)
    if not isinstance(result.return_value, Outcome):  # an aborted run ends without a value
        raise KeyboardInterrupt
    return result.return_value, Path(result.checkpoint.path)


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
