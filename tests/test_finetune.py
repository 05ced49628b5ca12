"""What the fine-tuning job refuses, and that it does so before anything starts."""

import json
from pathlib import Path

import pytest
import ray
from tiny_models import tiny_llama_folder

from cluster.home import kajiya_home
from train_jobs.finetune import main

GOOD = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n" * 4)
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the job, which must fail as one line and leave nothing; returns the line."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not ray.is_initialized()
    assert not list(kajiya_home().glob("runs/*"))
    assert not list(kajiya_home().glob("adapters/*/refused"))
    return error


def test_bad_requests_are_one_line_and_leave_nothing(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*words: str, base: str = model, file: Path = data, name: str = "refused") -> str:
        return refused(capsys, "--model", base, "--data", str(file), "--name", name, *words)

    assert "smollm2-135m-instruct" in ask(base="smollm2-135m-instrukt")
    assert "cannot name an adapter" in ask(name="a:b")
    assert "No such file" in ask(file=tmp_path / "absent.jsonl")
    assert "'rr'" in ask("--set", "rr=8")
    assert "r=" in ask("--set", "r=none")
    assert "--max-step" in ask("--max-step", "1")
    assert "nothing to train on is left within max_length=20" in ask("--max-length", "20")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(f"{GOOD}\n{{}}\n")
    assert f"{broken}:2: has the fields none" in ask(file=broken)
    assert f"{broken}:2: has the fields none" in ask("--eval-data", str(broken))
    single = tmp_path / "single.jsonl"
    single.write_text(GOOD)
    assert "--eval-data" in ask(file=single)


def test_a_home_that_cannot_be_written_is_named(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    assert "set KAJIYA_HOME" in refused(capsys, "--model", model, "--data", str(data), "--name", "refused")
