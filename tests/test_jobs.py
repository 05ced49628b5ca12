"""Jobs as they are listed, from what Ray's Jobs API hands out; the API itself is in `test_main_job.py`."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from cluster.local_ray import NoCluster
from kajiya import app
from train_jobs.jobs import ClusterSilent, UnknownJob, find_job, job_client, list_jobs, log_lines, metadata_of, stop_job
from train_jobs.progress import PREFIX

STEP = {"event": "step", "step": 3, "num_steps": 40, "losses": [1.25], "text": "step 3/40"}
TRIAL = {"event": "trial", "step": 8, "num_steps": 16, "value": 0.5, "objective": "held_out_loss"}
TRAIN = "python -m train_jobs.finetune --model smollm2-135m-instruct --data x.jsonl --name=shop"


def said(*events: dict[str, Any] | str) -> str:
    lines = [event if isinstance(event, str) else f"(worker) {PREFIX}{json.dumps(event)}" for event in events]
    return "".join(f"{line}\n" for line in lines)


@dataclass(kw_only=True)
class Api:
    """What `JobSubmissionClient` answers; a job that is asked to stop does so at the second look."""

    details: list[JobDetails]
    logs: dict[str, str] = field(default_factory=dict)
    looks: int = 0

    def list_jobs(self) -> list[JobDetails]:
        self.looks += 1
        if self.looks == 3:
            self.details = [d.model_copy(update={"status": JobStatus.STOPPED}) for d in self.details]
            self.logs = {key: log + "error: stopped; nothing was registered\n" for key, log in self.logs.items()}
        return self.details

    def get_job_logs(self, job_id: str) -> str:
        return self.logs[job_id]

    def stop_job(self, _: str) -> bool:
        return True


def details(job_id: str | None, entrypoint: str, start_ms: int = 0, **fields: Any) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION,
        submission_id=job_id,
        status=fields.pop("status", JobStatus.RUNNING),
        entrypoint=entrypoint,
        start_time=start_ms,
        **fields,
    )


@pytest.mark.parametrize(
    ("words", "metadata"),
    [
        (
            ["train_jobs.finetune", "--model", "m", "--data", "x", "--name", "a"],
            {"kind": "train", "model": "m", "name": "a"},
        ),
        (["-m", "tune_spaces.search", "--name=b", "--model=org/m"], {"kind": "tune", "model": "org/m", "name": "b"}),
        (["train_jobs.finetune", "--name"], {"kind": "train"}),
        (["sleep", "60", "--name", "a"], {}),
    ],
)
def test_a_job_is_named_after_what_it_was_asked_for(words: list[str], metadata: dict[str, str]) -> None:
    assert metadata_of(words) == metadata


def test_jobs_are_listed_newest_first_with_their_last_step() -> None:
    api: Any = Api(
        details=[
            details("old", TRAIN, 1_000_000),
            details("new", "x", 61_000_000, metadata={"kind": "tune", "model": "m", "name": "n"}),
            details("theirs", "echo 'never closed", 5, status=JobStatus.FAILED, message="exit code 1"),
            details(None, "a driver that was not submitted"),
        ],
        logs={
            "old": said("reading", STEP, {"event": "evaluation", "text": "x"}, f"{PREFIX}{{half a li"),
            "new": said(TRIAL),
            "theirs": "hello\n",
        },
    )
    new, old, theirs = list_jobs(api)
    assert (new.id, new.kind, new.model, new.name, new.step, new.num_steps, new.loss) == (
        "new", "tune", "m", "n", 8, 16, 0.5
    )  # fmt: skip
    assert (old.kind, old.name, old.state, old.step, old.num_steps, old.loss) == (
        "train",
        "shop",
        "running",
        3,
        40,
        1.25,
    )
    assert old.started_at == "1970-01-01T00:16:40+00:00"
    assert (theirs.kind, theirs.state, theirs.step, theirs.message) == ("", "failed", None, "exit code 1")


def test_an_unknown_job_is_named_beside_the_newest_there_are() -> None:
    api: Any = Api(details=[details("raysubmit_1", TRAIN, 1), details("raysubmit_2", TRAIN, 2)])
    with pytest.raises(UnknownJob, match=r"no job 'raysubmit_3'; the newest are raysubmit_2, raysubmit_1"):
        find_job(api, "raysubmit_3")
    with pytest.raises(UnknownJob, match="there is none on this cluster"):
        find_job(Api(details=[]), "x")


def test_a_stopped_job_tells_what_it_kept() -> None:
    api: Any = Api(details=[details("a", TRAIN, 1)], logs={"a": said(STEP)})
    stopped = stop_job(api, "a")
    assert (stopped.state, stopped.message, stopped.step) == ("stopped", "stopped; nothing was registered", 3)
    assert api.looks == 3  # it waited


def test_a_log_for_people_has_no_lines_for_programs() -> None:
    assert log_lines(said("reading", STEP, "done")) == ["reading", "done"]


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterSilent, match=r"http://127.0.0.1:9 does not answer jobs") as silent:
        job_client("http://127.0.0.1:9")
    assert "\n" not in str(silent.value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    for words in (["jobs"], ["jobs", "follow", "x"], ["jobs", "stop", "x"], ["jobs", "logs", "x"]):
        assert isinstance(CliRunner().invoke(app, words).exception, ClusterSilent)


def test_without_a_cluster_the_way_to_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for words in (["jobs"], ["jobs", "--json"], ["jobs", "stop", "x"]):
        error = CliRunner().invoke(app, words).exception
        assert isinstance(error, NoCluster)
        assert "kajiya up" in str(error)


@pytest.mark.parametrize("words", [["jobs"], ["jobs", "--json"]])
def test_the_list_prints_as_a_table_or_json(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(details=[details("raysubmit_abc", TRAIN, 1)], logs={"raysubmit_abc": said(STEP)})
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("train_jobs.jobs.JobSubmissionClient", lambda _: api)
    printed = CliRunner().invoke(app, words).stdout
    if "--json" in words:
        assert json.loads(printed)[0]["name"] == "shop"
    else:
        assert all(word in printed for word in ("raysubmit_abc", "train", "shop", "running", "3/40", "1.2500"))
