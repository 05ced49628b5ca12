"""The jobs of a cluster as Ray's Jobs API knows them, with how far each of them is."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.errors import UserError
from train_jobs.progress import PREFIX

KINDS = {"train_jobs.finetune": "train", "tune_spaces.search": "tune"}
"""What `kajiya` submits, by the module that runs."""
STOP_TIMEOUT_S = 30.0
"""Ray kills a job that does not end within seconds of being asked to."""
POLL_S = 0.3


class ClusterSilent(UserError, ConnectionError):
    """No cluster answers, or it does not let this user in."""


class UnknownJob(UserError, LookupError):
    """There is no job of this id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job that `kajiya` or `ray job submit` started."""

    id: str
    kind: str
    """`train` or `tune`; empty for a job of somebody else."""
    model: str
    name: str
    """Of the adapter."""
    state: str
    """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
    step: int | None
    num_steps: int | None
    loss: float | None
    """The last one announced: of a step, or what a trial reported."""
    started_at: str | None
    """UTC, ISO 8601."""
    message: str
    """What the job itself said last about its failure, else what Ray says."""

    @property
    def is_over(self) -> bool:
        """Return whether it will do nothing any more."""
        return self.state in {"succeeded", "failed", "stopped"}


def job_client(dashboard_url: str) -> JobSubmissionClient:
    """Return a client of the cluster; raises `ClusterSilent` where none answers or it refuses us."""
    try:
        return JobSubmissionClient(dashboard_url)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ClusterSilent(
            f"The cluster at {dashboard_url} does not answer jobs: {why}. Start one with `kajiya up`, or check "
            f"RAY_API_SERVER_ADDRESS and the token."
        ) from error


def metadata_of(words: Sequence[str]) -> dict[str, str]:
    """Return kind, model and name of the job that `words` start, as its metadata; empty for what is not ours."""
    kind = next((KINDS[word] for word in words if word in KINDS), None)
    if kind is None:
        return {}
    given = {option: _value(words, option) for option in ("--model", "--name")}
    return {"kind": kind} | {option.removeprefix("--"): value for option, value in given.items() if value}


def _value(words: Sequence[str], option: str) -> str:
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """Return the jobs that were submitted to the cluster, the newest first."""
    submitted = [details for details in client.list_jobs() if details.submission_id]
    newest_first = sorted(submitted, key=lambda details: details.start_time or 0, reverse=True)
    return [_job(details, client.get_job_logs(details.submission_id)) for details in newest_first]


def find_job(client: JobSubmissionClient, job_id: str) -> Job:
    """Return the job `job_id`; raises `UnknownJob`, which names the newest ones there are."""
    found = {details.submission_id: details for details in client.list_jobs() if details.submission_id}
    if job_id not in found:
        newest = sorted(found, key=lambda known: found[known].start_time or 0, reverse=True)[:3]
        there = f"the newest are {', '.join(newest)}" if newest else "there is none on this cluster"
        raise UnknownJob(f"There is no job {job_id!r}; {there}. `kajiya jobs` lists them all.")
    return _job(found[job_id], client.get_job_logs(job_id))


def stop_job(client: JobSubmissionClient, job_id: str) -> Job:
    """Ask the job to end and return it once it has; one that is over is returned as it is."""
    client.stop_job(job_id)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while not (job := find_job(client, job_id)).is_over and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return job


def log_lines(text: str) -> list[str]:
    """Return the lines of a log that are meant for people."""
    return [line for line in text.splitlines() if PREFIX not in line]


def _job(details: JobDetails, log: str) -> Job:
    described: Mapping[str, str] = details.metadata or {}
    if "kind" not in described:  # submitted by `ray job submit`
        described = metadata_of(_words(details.entrypoint))
    last = _last_step(log)
    started_s = (details.start_time or 0) / 1000
    return Job(
        id=details.submission_id,
        kind=described.get("kind", ""),
        model=described.get("model", ""),
        name=described.get("name", ""),
        state=JobStatus(details.status).value.lower(),
        step=last.get("step"),
        num_steps=last.get("num_steps"),
        loss=_loss(last),
        started_at=datetime.fromtimestamp(started_s, UTC).isoformat(timespec="seconds") if started_s else None,
        message=_error(log) or details.message or "",
    )


def _words(entrypoint: str) -> list[str]:
    try:
        return shlex.split(entrypoint)
    except ValueError:  # somebody else's shell line with an open quote
        return []


def _last_step(log: str) -> dict[str, Any]:
    """Return the last event that tells a step, or nothing."""
    end = len(log)
    while (start := log.rfind(PREFIX, 0, end)) >= 0:
        event: dict[str, Any] = _event(log[start + len(PREFIX) :].partition("\n")[0])
        if event.get("event") in {"step", "trial"}:
            return event
        end = start
    return {}


def _event(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except json.JSONDecodeError:  # a line that is being written
        return {}
    return event if isinstance(event, dict) else {}


def _loss(event: Mapping[str, Any]) -> float | None:
    losses = event.get("losses") or [event.get("value")]
    return None if losses[0] is None else float(losses[0])


def _error(log: str) -> str:
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""
