"""Where the curves of a run can be followed: MLflow and TensorBoard."""

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.errors import UserError
from cluster.home import make_home_folder

TrackerName = Literal["mlflow", "tensorboard"]
PACKAGES: dict[TrackerName, tuple[str, str]] = {
    "mlflow": ("mlflow", "mlflow-skinny"),
    "tensorboard": ("tensorboardX", "tensorboardX"),
}
"""What is imported, and what to install for it."""
EXPERIMENT = "kajiya"
RUN_TAG = "kajiya.run"
BATCH = 1000
"""Values in one call, the most that MLflow takes."""


class MissingTracker(UserError, ImportError):
    """The package of the tracker is not installed where the job runs."""


class TrackerUnusable(UserError, RuntimeError):
    """The tracker does not take the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One value of a curve."""

    curve: str
    step: int
    value: float


class Tracker(Protocol):
    """One run in a tracker. Points that it has already are not written again."""

    @property
    def place(self) -> str:
        """Return how to look at it."""

    def add(self, points: Sequence[Point]) -> None:
        """Write the points that are not there yet; those of a curve come in the order of their steps."""

    def write(self, texts: Mapping[str, str]) -> None:
        """Write the texts, by title."""

    def close(self, *, is_finished: bool) -> None:
        """Write that the run has ended."""


def check_tracker(name: TrackerName | None) -> None:
    """Raise `MissingTracker` where the package of `name` is not installed."""
    if name is None:
        return
    module, package = PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        raise MissingTracker(f"--track {name} needs the package {package}: pip install {package}, or leave it out.")


def open_tracker(name: TrackerName, run: str) -> Tracker:
    """Return the place of `run` in the tracker.

    A run that is resumed goes on where it was.

    Raises:
        TrackerUnusable: It does not take the run.
    """
    if name == "tensorboard":
        return open_tensorboard(make_home_folder(f"tracking/tensorboard/{run}"))
    return open_mlflow(run)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBoard:
    """Event files in `folder`. A resumed run writes them anew, for its checkpoint holds all steps from the first."""

    folder: Path
    writer: Any
    last_steps: dict[str, int]

    @property
    def place(self) -> str:
        """Return the command that shows all runs."""
        return f"tensorboard --logdir {self.folder.parent}"

    def add(self, points: Sequence[Point]) -> None:
        """Write the points that are not there yet."""
        for point in _new(points, self.last_steps):
            self.writer.add_scalar(point.curve, point.value, point.step)
        self.writer.flush()

    def write(self, texts: Mapping[str, str]) -> None:
        """Write the texts, by title."""
        for title, text in texts.items():
            self.writer.add_text(title, text)

    def close(self, *, is_finished: bool) -> None:  # noqa: ARG002 (TensorBoard does not tell ended runs from others)
        """Put everything on disk."""
        self.writer.close()


def open_tensorboard(folder: Path) -> TensorBoard:
    """Return the run in `folder`, emptied."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder)
    return TensorBoard(folder=folder, writer=SummaryWriter(str(folder)), last_steps={})


@dataclass(frozen=True, kw_only=True, slots=True)
class MLflow:
    """A run of MLflow. What it has already is asked of it, so that a resumed run goes on behind its last step."""

    client: Any
    run_id: str
    uri: str
    last_steps: dict[str, int]

    @property
    def place(self) -> str:
        """Return where the run is."""
        return f"MLflow at {self.uri}, experiment {os.environ.get('MLFLOW_EXPERIMENT_NAME', EXPERIMENT)}"

    def add(self, points: Sequence[Point]) -> None:
        """Write the points that are not there yet."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(p.curve, p.value, now_ms, p.step) for p in _new(points, self.last_steps)]
        with _refusals(self.uri):
            for begin in range(0, len(metrics), BATCH):
                self.client.log_batch(self.run_id, metrics=metrics[begin : begin + BATCH])

    def write(self, texts: Mapping[str, str]) -> None:
        """Write the texts as files, by title."""
        with _refusals(self.uri):
            for title, text in texts.items():
                self.client.log_text(self.run_id, text, f"{title}.md")

    def close(self, *, is_finished: bool) -> None:
        """Write that the run has ended."""
        with _refusals(self.uri):
            self.client.set_terminated(self.run_id, "FINISHED" if is_finished else "FAILED")


def open_mlflow(run: str) -> MLflow:
    """Return `run` in MLflow at `MLFLOW_TRACKING_URI`, else in a folder under `KAJIYA_HOME`."""
    from mlflow.tracking import MlflowClient

    home = make_home_folder("tracking")
    wanted = os.environ.get("MLFLOW_TRACKING_URI")
    uri = wanted or f"sqlite:///{home}/mlflow.db"
    with _refusals(uri):
        client = MlflowClient(tracking_uri=uri)
        run_id = _run_id(client, run, artifact_location=None if wanted else str(home / "mlflow"))
        curves = client.get_run(run_id).data.metrics
        last_steps = {curve: _last_step(client, run_id, curve) for curve in curves}
    return MLflow(client=client, run_id=run_id, uri=uri, last_steps=last_steps)


@contextmanager
def _refusals(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, ImportError) as error:
        why = str(error).splitlines()[0][:200]
        raise TrackerUnusable(f"MLflow at {uri} does not take the run ({why}); set MLFLOW_TRACKING_URI.") from error


def _run_id(client: Any, run: str, *, artifact_location: str | None) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location)
    found = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{run}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, run_name=run, tags={RUN_TAG: run}).info.run_id)


def _last_step(client: Any, run_id: str, curve: str) -> int:
    return max(int(metric.step) for metric in client.get_metric_history(run_id, curve))


def _new(points: Sequence[Point], last_steps: dict[str, int]) -> list[Point]:
    """Return the points behind the last ones of their curves, and make them the last ones."""
    new = [point for point in points if point.step > last_steps.get(point.curve, -1)]
    last_steps |= {point.curve: max(point.step, last_steps.get(point.curve, -1)) for point in new}
    return new
