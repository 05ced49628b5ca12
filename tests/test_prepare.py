"""From a request to a job: the numbers that follow from the data."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.hardware import detect
from cluster.plan import plan_training
from train_jobs.arguments import read_arguments
from train_jobs.job import TrainJob
from train_jobs.prepare import build_job, read_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny"))


def job_of(model: str, folder: Path, *words: str, num_dialogues: int) -> TrainJob:
    path = folder / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(f"{json.dumps({'messages': turns})}\n" * num_dialogues)
    arguments = ["--model", model, "--data", str(path), "--eval-data", str(path), "--name", "x", *words]
    request = read_arguments(arguments)
    plan = plan_training(find(model), detect(), overrides=request.overrides, num_workers=2)
    return build_job(request, plan, read_data(request, plan))


def test_steps_and_warm_up_follow_from_the_data(model: str, tmp_path: Path) -> None:
    words = ("--epochs", "2", "--set", "micro_batch_size=2", "--set", "gradient_accumulation_steps=1")
    job = job_of(model, tmp_path, *words, num_dialogues=41)
    # 41 dialogues in batches of 2 x 2 workers are 11 steps, twice; the specification's 500 warm-up steps never end.
    assert (job.batch_size, job.adapters[0].num_steps) == (4, 22)
    assert job.adapters[0].num_warmup_steps == 2


def test_a_batch_that_is_large_for_the_data_is_said(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(model, tmp_path, num_dialogues=64)
    assert job.batch_size == 64
    assert "is only 1 step of 64" in capsys.readouterr().out
    job_of(
        model,
        tmp_path,
        *("--set", "micro_batch_size=2", "--set", "gradient_accumulation_steps=1"),
        num_dialogues=64,
    )
    assert "little data" not in capsys.readouterr().out
