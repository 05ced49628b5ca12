"""A run that goes on must be the run that began."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.hardware import detect
from cluster.plan import plan_training
from train_jobs.arguments import Request, Resume, read_arguments, read_resume
from train_jobs.command_line import UsageError
from train_jobs.job import TrainJob
from train_jobs.prepare import build_job, read_data
from train_jobs.resume import NotTheSameRun, RunRecord, resumed
from train_jobs.run_store import RunStore
from train_jobs.worker import cut_for

SHA256 = "5" * 64


@pytest.fixture(scope="module")
def request_and_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, TrainJob]:
    folder = tmp_path_factory.mktemp("resume")
    model, data = tiny_llama_folder(folder / "tiny"), folder / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    words = ["--model", str(model), "--data", str(data), "--name", "shop", "--set", "micro_batch_size=2"]
    request = read_arguments([*words, "--set", "gradient_accumulation_steps=4", "--num-workers", "1"])
    return request, job_of(request)


def job_of(request: Request) -> TrainJob:
    plan = plan_training(find(request.model), detect(), overrides=request.overrides, num_workers=request.num_workers)
    return build_job(request, plan, read_data(request, plan))


@pytest.fixture
def run(request_and_job: tuple[Request, TrainJob], tmp_path: Path) -> RunStore:
    run = RunStore(root=str(tmp_path), run="shop-20260101-000000-abcdef")
    run.write_record(RunRecord.of(request_and_job[0], SHA256, request_and_job[1]).model_dump_json().encode())
    return run


def test_the_request_comes_back_as_it_was(request_and_job: tuple[Request, TrainJob], run: RunStore) -> None:
    request, found, record = resumed(Resume(run="shop", storage=run.root))
    assert request == replace(request_and_job[0], storage=run.root)
    assert found == run
    record.check(SHA256, job_of(request), found)


def test_other_workers_share_the_same_batch(request_and_job: tuple[Request, TrainJob], run: RunStore) -> None:
    request, _, record = resumed(Resume(run="shop", storage=run.root, num_workers=2))
    job = job_of(request)
    assert (request.num_workers, job.batch_size, job.gradient_accumulation_steps) == (2, 8, 2)
    record.check(SHA256, job, run)


@pytest.mark.parametrize(("planned", "now", "expected"), [(2, 1, 8), (2, 2, 4), (2, 3, 3), (2, 4, 2), (1, 8, 1)])
def test_micro_batches_are_dealt_to_as_many_workers_as_there_are(
    planned: int, now: int, expected: int, request_and_job: tuple[Request, TrainJob]
) -> None:
    assert cut_for(request_and_job[1], planned, now).gradient_accumulation_steps == expected


def test_what_has_changed_is_named(request_and_job: tuple[Request, TrainJob], run: RunStore) -> None:
    _, job = request_and_job
    record = RunRecord.model_validate_json(run.read_record())
    with pytest.raises(NotTheSameRun, match=r"The data of shop-20260101-000000-abcdef has changed .*\(SHA-256 6{12}…"):
        record.check("6" * 64, job, run)
    hot = replace(job, adapters=(replace(job.adapters[0], learning_rate=0.5),))
    with pytest.raises(NotTheSameRun, match=r"learning_rate is 0\.5, and was .* when it began"):
        record.check(SHA256, hot, run)
    with pytest.raises(NotTheSameRun, match=r"samples is \"TokenStore\(.* 17 samples, .*, and was .* 18 samples"):
        record.check(SHA256, replace(job, samples=job.samples[1:]), run)
    record.check(SHA256, replace(job, num_threads=64, gradient_checkpointing=True), run)


def test_a_record_of_another_version_is_said(run: RunStore) -> None:
    record = json.loads(run.read_record())
    record["request"] |= {"model": 7}
    run.write_record(json.dumps(record).encode())
    with pytest.raises(NotTheSameRun, match="was begun by another version of Kajiya"):
        resumed(Resume(run="shop", storage=run.root))


def test_only_what_leaves_the_run_as_it_is_may_be_said_beside_resume() -> None:
    words = ["--resume", "shop", "--storage", "s3://b/runs", "--num-workers", "2", "--data", "moved.jsonl"]
    assert read_resume(words) == Resume(run="shop", storage="s3://b/runs", num_workers=2, data="moved.jsonl")
    assert read_resume(["--model", "m"]) is None
    with pytest.raises(UsageError, match="leave out --max-steps"):
        read_resume([*words, "--max-steps", "5"])
    with pytest.raises(UsageError, match="leave out --set"):
        read_resume([*words, "--set", "r=8"])
