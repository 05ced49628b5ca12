"""From a request to a job: the numbers that follow from the data."""

import json
from pathlib import Path

import pytest
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.hardware import detect
from cluster.plan import plan_training
from train_jobs.arguments import read_arguments
from train_jobs.job import TrainJob
from train_jobs.prepare import Data, build_job, read_data
from train_jobs.records import DataError


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


def data_of(model: str, path: Path, max_length: int) -> Data:
    request = read_arguments(["--model", model, "--data", str(path), "--name", "x", "--max-length", str(max_length)])
    return read_data(request, plan_training(find(model), detect(), max_length=max_length, num_workers=1))


@pytest.mark.parametrize(("max_length", "end", "begin"), [(7, 1799, 1806), (10, 1800, 1800), (64, 1792, 1856)])
def test_the_last_tenth_of_a_single_text_is_held_out_whatever_the_length_of_its_pieces(
    model: str, tmp_path: Path, max_length: int, end: int, begin: int
) -> None:
    # 2000 letters and the end, a token each, of which nine tenths are 1800.9. In pieces of 10, the end is alone and
    # left out: then they are 1800.
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i:04d}" for i in range(500)))
    data = data_of(model, path, max_length)
    tokenizer = byte_tokenizer()
    trained, held_out = (
        [tokenizer.decode(sample.input_ids) for sample in part.samples] for part in (data.train, data.held_out)
    )
    text = path.read_text()
    assert "".join(trained) == text[:end]
    assert "".join(held_out).removesuffix("<|im_end|>") == text[begin:]
    assert data.questions == ()


def test_a_text_that_is_too_short_to_be_split_is_refused(model: str, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("twelve words")
    with pytest.raises(DataError, match=r"One text of 13 tokens is too short .* give --eval-data"):
        data_of(model, path, 8)


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
