"""What all trials of a search have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from train_jobs.job import AdapterJob, TrainJob
from tune_spaces.shapes import Shape, shape_of
from tune_spaces.trial_jobs import adapter_job


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What a trial that is a run of its own needs."""

    folder: Path
    """Holds a folder for the runs of each trial; on several nodes it is shared storage."""
    num_workers: int
    """Of each trial."""
    use_gpu: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What goes to every trial."""

    job: TrainJob
    """Its one adapter is the plan's own choice."""
    rungs: tuple[int, ...]
    """Optimizer steps after which trials report."""
    weight_bytes: int
    """Of the bare base, as it is loaded."""
    is_exact_match: bool
    """Whether each report counts right answers, too."""
    workers: tuple[ActorHandle, ...]
    """`PackWorker` actors; none where each trial is a run of its own."""
    launch: Launch | None
    """None where trials share a base."""
    shape: Shape | None = None
    """The plan's own; None where the space has no field of it."""
    jobs: Mapping[Shape, TrainJob] = field(default_factory=dict)
    """Of every shape that trials may have."""

    def shape_with(self, config: Mapping[str, Any]) -> Shape | None:
        """Return the shape of the trial with the values `config`; None is that of `job`."""
        return None if self.shape is None else shape_of(self.shape, config)

    def job_with(self, config: Mapping[str, Any]) -> TrainJob:
        """Return the job that trains the values `config` alone."""
        shape = self.shape_with(config)
        job = self.job if shape is None else self.jobs[shape]
        return replace(job, adapters=(adapter_job(self.default, config),))

    @property
    def default(self) -> AdapterJob:
        """Return the plan's own choice."""
        return self.job.adapters[0]
