"""Go on with a run whose driver is gone: it must be the same run, or its losses would be nobody's."""

import hashlib
import json
from dataclasses import asdict, replace

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from cluster.errors import UserError
from train_jobs.arguments import Request, Resume
from train_jobs.job import TrainJob
from train_jobs.run_store import RunStore, find_run

PARTS_OF_A_MACHINE = frozenset(
    {
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "strategy",
        "deepspeed_zero",
        "num_threads",
        "checkpoint_steps",
    }
)
"""Fields of a job that say how it is carried out, not what is learned."""
_REQUEST = TypeAdapter(Request)


class NotTheSameRun(UserError, ValueError):
    """What the run is made of has changed since it began."""


class RunRecord(BaseModel):
    """What a run is, written before it starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: dict[str, JsonValue]
    """What was asked for."""
    data_sha256: str
    """Of the file of `request`."""
    batch_size: int
    """Samples per optimizer step, whatever the number of workers."""
    job: dict[str, str]
    """Each part of what is learned, in short."""

    @classmethod
    def of(cls, request: Request, data_sha256: str, job: TrainJob) -> "RunRecord":
        """Return the record of a run."""
        return cls(
            request=_REQUEST.dump_python(request, mode="json"),
            data_sha256=data_sha256,
            batch_size=job.batch_size,
            job=summary(job),
        )

    def check(self, data_sha256: str, job: TrainJob, run: RunStore) -> None:
        """Raise `NotTheSameRun` unless `job` learns the same from the same data."""
        if data_sha256 != self.data_sha256:
            raise NotTheSameRun(
                f"The data of {run.run} has changed since it began (SHA-256 {data_sha256[:12]}…, then "
                f"{self.data_sha256[:12]}…); give the file as it was with --data, or start a new run."
            )
        now = summary(job)
        changed = [name for name in sorted(now.keys() | self.job.keys()) if now.get(name) != self.job.get(name)]
        if changed:
            name = changed[0]
            raise NotTheSameRun(
                f"{run.run} cannot go on: {name} is {now.get(name)}, and was {self.job.get(name)} when it began; "
                "go on on the same kind of machine with the same version of Kajiya, or start a new run."
            )


def summary(job: TrainJob) -> dict[str, str]:
    """Return each part of what `job` learns, long ones as a hash."""
    parts = {name: value for name, value in asdict(job).items() if name not in PARTS_OF_A_MACHINE}
    (adapter,) = parts.pop("adapters")
    texts = {
        name: json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)  # a `TokenStore` says what is in it
        for name, value in (parts | adapter).items()
    }
    return {name: text if len(text) <= 200 else _sha256(text)[:16] for name, text in texts.items()}


def resumed(asked: Resume) -> tuple[Request, RunStore, RunRecord]:
    """Return the request of the run that `asked` names, as it was but for the machine, its store and its record.

    Raises:
        UnknownRun: There is no such run.
        NotTheSameRun: Its record is of another version.
    """
    run = find_run(asked.run, asked.storage)
    try:
        record = RunRecord.model_validate_json(run.read_record())
        request = _REQUEST.validate_python(record.request)
    except ValidationError as error:
        raise NotTheSameRun(
            f"{run.uri} was begun by another version of Kajiya ({error.errors()[0]['msg']}); start a new run."
        ) from None
    request = replace(
        request,
        data=asked.data or request.data,
        eval_data=asked.eval_data or request.eval_data,
        storage=asked.storage,
        min_workers=asked.min_workers or request.min_workers,
    )
    if asked.num_workers is not None:
        request = _on(request, asked.num_workers, record.batch_size)
    return request, run, record


def _on(request: Request, num_workers: int, batch_size: int) -> Request:
    """Return `request` for other workers with the same batch."""
    cut = {"gradient_accumulation_steps", "effective_batch_size"}
    overrides = {name: value for name, value in request.overrides.items() if name not in cut}
    return replace(request, num_workers=num_workers, overrides=overrides | {"effective_batch_size": str(batch_size)})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
