"""What all trials of a search have in common."""

from dataclasses import dataclass
from pathlib import Path

from ray.actor import ActorHandle

from train_jobs.job import AdapterJob, TrainJob


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

    @property
    def default(self) -> AdapterJob:
        """Return the plan's own choice."""
        return self.job.adapters[0]
