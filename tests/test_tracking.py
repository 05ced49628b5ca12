"""A run that is followed while it trains, dies and goes on: every step stands in the tracker once."""

from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pack import adapter, job_of, pack_of
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.hardware import declared
from cluster.home import kajiya_home
from cluster.plan import plan_training
from train_jobs import loop, tracking
from train_jobs.evaluate import Evaluation
from train_jobs.job import Question, TrainJob
from train_jobs.loop import Outcome
from train_jobs.pack import Pack
from train_jobs.prepare import Data, Source
from train_jobs.progress import StepMetrics
from train_jobs.run_store import RunStore
from train_jobs.step import PackStep, train_step
from train_jobs.tokenized import TokenizedData
from train_jobs.trackers import Point, TrackerUnusable
from train_jobs.tracking import Followed, answers_table, followed, outcome_points

STEP = StepMetrics(
    step=1, num_steps=1, losses=(2.0,), learning_rates=(0.1,), grad_norms=(), num_tokens=10, duration_s=0.5
)


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    card = find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))
    return replace(job_of(card, adapter(1, steps=8)), checkpoint_steps=3)


def data_of(job: TrainJob) -> Data:
    return Data(
        file=Source(name="chats.jsonl", sha256="ab" * 32, format="OpenAI messages"),
        train=TokenizedData(samples=job.samples, num_cut=0),
        held_out=TokenizedData(samples=job.held_out, num_cut=0),
        questions=job.questions,
    )


def test_each_step_is_told_once_though_the_run_died(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    monkeypatch.setattr(tracking, "POLL_S", 0.01)
    store = RunStore(root=str(tmp_path), run="shop-20260101-000000-abcdef")
    store.write_record(b"{}")
    plan = plan_training(job.card, declared(gpu=None, num_cpus=2, ram_bytes=2**33))

    def steps_until_5(pack: Pack, steps: dict[int, int]) -> PackStep:
        if max(steps.values()) == 4:
            raise Killed
        return train_step(pack, steps)

    def train() -> None:
        with followed("tensorboard", store, plan, data_of(job)) as one:
            one.outcome = loop.run(pack_of(job), byte_tokenizer(), store)
            outcomes.append(one.outcome)

    outcomes: list[Outcome] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", steps_until_5)
        with pytest.raises(Killed):
            train()
    folder = kajiya_home() / "tracking" / "tensorboard" / store.run
    assert [event.step for event in scalars(folder, "train/loss")] == [1, 2, 3]  # as far as is kept
    train()
    told = scalars(folder, "train/loss")
    assert [event.step for event in told] == list(range(1, 9))
    assert [event.value for event in told] == pytest.approx([step.losses[0] for step in outcomes[0].history])
    assert [event.step for event in scalars(folder, "held_out/loss")] == [0, 8]
    assert f"tensorboard --logdir {folder.parent}" in capsys.readouterr().out


def scalars(folder: Path, curve: str) -> list[Point]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return [Point(curve=curve, step=event.step, value=event.value) for event in read.Scalars(curve)]


def test_no_tracker_is_no_work(tmp_path: Path, job: TrainJob) -> None:
    plan = plan_training(job.card, declared(gpu=None, num_cpus=2, ram_bytes=2**33))
    with followed(None, RunStore(root=str(tmp_path), run="x"), plan, data_of(job)) as one:
        assert one.tracker is None


class Down:
    """A tracker whose server has gone."""

    place = "nowhere"

    def add(self, points: object) -> None:  # noqa: ARG002
        raise TrackerUnusable("the server is gone")

    def write(self, texts: object) -> None:  # noqa: ARG002
        raise AssertionError

    def close(self, *, is_finished: bool) -> None:  # noqa: ARG002
        raise AssertionError


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, job: TrainJob, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Followed(run=RunStore(root=str(tmp_path), run="x"), tracker=Down())
    assert one.tracker is not None
    with one.trouble_is_a_warning():
        one.tracker.add([])
    assert "Tracking has ended, the run goes on: the server is gone" in capsys.readouterr().out
    one.close(data_of(job))
    assert one.tracker is None


def test_answers_stand_side_by_side(job: TrainJob) -> None:
    question = Question(prompt_ids=(1,), answer_contains="火曜", max_new_tokens=5, text="休み|は?")
    before = Evaluation(loss=3.5, num_right=0, num_questions=1, answers=("わかりません。",))
    after = Evaluation(loss=1.25, num_right=1, num_questions=1, answers=("火曜\nです。",))
    outcome = Outcome(before=before, after=(after,), history=(STEP,))
    table = answers_table(replace(data_of(job), questions=(question,)), outcome)
    assert table.splitlines()[2] == "| 休み\\|は? | 火曜 | わかりません。 | 火曜 です。 |"
    looks = [point for point in outcome_points(outcome) if point.curve == "held_out/loss"]
    assert [(look.step, look.value) for look in looks] == [(0, 3.5), (1, 1.25)]
