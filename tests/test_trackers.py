"""What trackers are told: TensorBoard's files by its own reader; MLflow by a recording of the calls of its client.

MLflow's own client is not among the tested packages: it holds back versions that others here want newer.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.home import kajiya_home
from train_jobs.trackers import (
    MissingTracker,
    Point,
    TrackerUnusable,
    check_tracker,
    open_mlflow,
    open_tensorboard,
    open_tracker,
)


def curve(*steps: int, name: str = "train/loss") -> list[Point]:
    return [Point(curve=name, step=step, value=1 / step) for step in steps]


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker(None)
    check_tracker("tensorboard")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingTracker, match="--track mlflow needs the package mlflow-skinny: pip install"):
        check_tracker("mlflow")


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tracker = open_tensorboard(tmp_path / "run")
    tracker.write({"plan": "| r | 8 |"})
    tracker.add(curve(1, 2))
    tracker.add([*curve(1, 2, 3), *curve(2, name="held_out/loss")])
    tracker.write({"answers": "| a |"})
    tracker.close(is_finished=True)
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert [event.step for event in read.Scalars("held_out/loss")] == [2]
    (text,) = read.Tensors("plan/text_summary")
    assert text.tensor_proto.string_val == [b"| r | 8 |"]
    assert tracker.place == f"tensorboard --logdir {tmp_path}"


def test_a_resumed_run_writes_its_event_files_anew() -> None:
    for steps in ((1, 2, 3), (1, 2)):
        tracker = open_tracker("tensorboard", "shop-1")
        tracker.add(curve(*steps))
        tracker.close(is_finished=False)
    read = EventAccumulator(str(kajiya_home() / "tracking" / "tensorboard" / "shop-1"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2]


class Refused(Exception):
    """Stands for MLflow's own exception."""


class Client:
    """The calls of `mlflow.tracking.MlflowClient` that are used, over stores shared by all clients of a test."""

    runs: dict[str, SimpleNamespace]
    is_down = False

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> Any:
        if self.is_down:
            raise Refused("no connection\nand a traceback")
        return SimpleNamespace(experiment_id=name) if self.runs else None

    def create_experiment(self, name: str, _artifact_location: str | None) -> str:
        return name

    def create_run(self, _experiment_id: str, *, run_name: str, tags: dict[str, str]) -> Any:
        run = SimpleNamespace(
            info=SimpleNamespace(run_id=f"id-{run_name}", status="RUNNING"), tags=tags, logged=[], texts={}
        )
        self.runs[run.info.run_id] = run
        return run

    def search_runs(self, _experiment_ids: list[str], *, filter_string: str, **_: int) -> list[Any]:
        name, value = filter_string.split(" = ")
        return [run for run in self.runs.values() if run.tags.get(name[6:-1]) == value[1:-1]]

    def update_run(self, run_id: str, *, status: str) -> None:
        self.runs[run_id].info.status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.update_run(run_id, status=status)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.runs[run_id].texts[artifact_file] = text

    def get_run(self, run_id: str) -> Any:
        curves = {key: value for key, value, _, _ in self.runs[run_id].logged}
        return SimpleNamespace(data=SimpleNamespace(metrics=curves))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step) for name, _, _, step in self.runs[run_id].logged if name == key]

    def log_batch(self, run_id: str, *, metrics: list[Any]) -> None:
        self.runs[run_id].logged += metrics


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    class Fresh(Client):
        runs: dict[str, SimpleNamespace] = {}  # noqa: RUF012

    parts: dict[str, dict[str, Any]] = {
        "mlflow": {},
        "mlflow.tracking": {"MlflowClient": Fresh},
        "mlflow.entities": {"Metric": lambda *fields: fields},
        "mlflow.exceptions": {"MlflowException": Refused},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return Fresh


def test_a_resumed_run_goes_on_behind_what_mlflow_has(client: type[Client]) -> None:
    first = open_tracker("mlflow", "shop-1")
    first.write({"plan": "| r | 8 |"})
    first.add(curve(1, 2, 3))
    first.close(is_finished=False)
    assert client.runs["id-shop-1"].info.status == "FAILED"
    again = open_mlflow("shop-1")
    again.write({"plan": "| r | 8 |"})
    assert client.runs["id-shop-1"].info.status == "RUNNING"
    again.add(curve(1, 2, 3, 4))
    again.write({"answers": "| a |"})
    again.close(is_finished=True)
    (run,) = client.runs.values()
    assert [(name, step) for name, _, _, step in run.logged] == [("train/loss", step) for step in (1, 2, 3, 4)]
    assert run.texts == {"plan.md": "| r | 8 |", "answers.md": "| a |"}
    assert run.info.status == "FINISHED"


def test_mlflow_lies_under_the_home_or_where_the_user_says(
    client: type[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_mlflow("shop-1").uri == f"sqlite:///{kajiya_home()}/tracking/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert open_mlflow("shop-2").uri == "http://tracker:5000"


def test_a_server_that_is_down_is_said_before_anything_starts(client: type[Client]) -> None:
    client.is_down = True
    with pytest.raises(TrackerUnusable, match=r"does not take the run \(no connection\)"):
        open_mlflow("shop-1")
