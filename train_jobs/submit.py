"""Submit a training job through Ray's Jobs API and follow it, as `ray job submit` does."""

import asyncio
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.errors import UserError
from cluster.local_ray import is_on_this_machine
from train_jobs.jobs import job_client, metadata_of
from train_jobs.progress import PREFIX

MLFLOW_PLACE = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Variables of the user's that a job takes along."""


class JobFailed(UserError, RuntimeError):
    """The job ended without success; the message is its own last word."""


def submit(dashboard_url: str, module: str, arguments: Sequence[str], files: Sequence[Path]) -> str:
    """Submit `python -m module arguments` and return the job's id.

    `files` are the arguments that name data. A cluster on this machine reads them where they are; to any other one
    they travel with the job. Kind, model and name become the job's metadata, which `kajiya jobs` and Ray's dashboard
    show.
    """
    client = job_client(dashboard_url)
    metadata = metadata_of([module, *arguments])
    if is_on_this_machine(dashboard_url):
        absolute = {str(file): str(file.resolve()) for file in files}
        words = [sys.executable, "-m", module, *(absolute.get(word, word) for word in arguments)]
        return str(client.submit_job(entrypoint=shlex.join(words), runtime_env=_environment(), metadata=metadata))
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            copyfile(file, Path(folder) / file.name)
        names = {str(file): file.name for file in files}
        words = ["python", "-m", module, *(names.get(word, word) for word in arguments)]
        runtime_env = {"working_dir": folder, **_environment()}
        return str(client.submit_job(entrypoint=shlex.join(words), runtime_env=runtime_env, metadata=metadata))


def _environment() -> dict[str, Any]:
    """Return the part of a runtime environment that says where MLflow is; no secrets, for Ray's dashboard shows it."""
    variables = {name: os.environ[name] for name in MLFLOW_PLACE if name in os.environ}
    return {"env_vars": variables} if variables else {}


def follow(dashboard_url: str, job_id: str, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Read the job's log until it ends and hand each announced event to `on_event`.

    Raises:
        JobFailed: the job failed or was stopped.
    """
    # Ray says that it closed the connection when the log has ended, which is what we wait for.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    client = job_client(dashboard_url)
    last_line = asyncio.run(_read(client, job_id, on_event))
    status = client.get_job_status(job_id)
    if status != JobStatus.SUCCEEDED:
        raise JobFailed(last_line.removeprefix("error: ") or f"Job {job_id} ended as {status}.")


def stop(dashboard_url: str, job_id: str) -> None:
    """Ask Ray to end the job."""
    job_client(dashboard_url).stop_job(job_id)


async def _read(client: JobSubmissionClient, job_id: str, on_event: Callable[[dict[str, Any]], None]) -> str:
    rest, last_line = "", ""
    async for chunk in client.tail_job_logs(job_id):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            _, marker, event = line.partition(PREFIX)
            if marker:
                on_event(json.loads(event))
            elif line.startswith("error: ") or (line.strip() and not last_line.startswith("error: ")):
                last_line = line.strip()
    return last_line
