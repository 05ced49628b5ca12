"""The command without a cluster: tables, JSON, and errors of one line before anything is started."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KAJIYA = Path(sys.executable).with_name("kajiya")


def kajiya(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": "100", **environment}
    return subprocess.run([KAJIYA, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_models_prints_all_ten_with_their_japanese_notes() -> None:
    said = kajiya("models").stdout
    assert said.count("量子化") >= 5
    for name in ("smollm2-135m-instruct", "qwen2.5-14b-instruct", "phi-3.5-moe-instruct", "llama-3.1-70b-instruct"):
        assert name in said
    assert len(json.loads(kajiya("models", "--json").stdout)) == 10


def test_plan_prints_a_table_or_json() -> None:
    words = ("plan", "qwen2.5-14b-instruct", "--gpu", "A100-80G", "--num-gpus", "2")
    assert "weights" in kajiya(*words).stdout
    made = json.loads(kajiya(*words, "--for", "train", "--json").stdout)
    assert made["precision"] == "int8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "qwen2.5-41b"), "qwen2.5-14b-instruct"),
        (("plan", "llama-3.1-70b-instruct", "--gpu", "A10G"), "It fits on"),
        (("plan", "smollm2-135m-instruct", "--gpu", "A1000"), "No GPU called 'A1000'"),
        (("plan", "smollm2-135m-instruct", "--precision", "fp4"), "choose one of fp32"),
        (("up", "qwen2.5-41b"), "qwen2.5-14b-instruct"),
        (("up", "japanese-gpt2-small"), "the hub does not answer"),
        (("train", "smollm2-135m-instruct", "--data", "nowhere.jsonl", "--name", "x"), "nowhere.jsonl"),
        (("train", "smollm2-135m-instruct", "--data", "README.md", "--name", "x"), "README.md"),
        (
            ("train", "smollm2-135m-instruct", "--data", "examples/tsuchineya_faq/train.jsonl", "--name", "a:b"),
            "cannot name an adapter",
        ),
        (
            ("train", "smollm2-135m-instruct", "--data", "examples/tsuchineya_faq/train.jsonl", "--name", "x"),
            "kajiya up",
        ),
        (("train", "--resume", "no-such-run"), "no run 'no-such-run'"),
        (("train", "--resume", "no-such-run", "--epochs", "2"), "leave out --epochs"),
        (("adapters", "show", "smollm2-135m-instruct"), "write MODEL:ADAPTER"),
        (("adapters", "show", "smollm2-135m-instruct:none-such"), "no adapter 'none-such'"),
        (("adapters", "promote", "smollm2-135m-instruct:none-such@2"), "no adapter 'none-such'"),
        (("chat", "smollm2-135m-instruct", "-m", "Hi", "--base-url", "http://127.0.0.1:9/v1"), "Nothing answers"),
    ],
)
def test_bad_input_is_one_line_on_stderr(words: tuple[str, ...], message: str) -> None:
    done = kajiya(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_debug_shows_where_an_error_came_from() -> None:
    assert "Traceback" in kajiya("plan", "qwen2.5-41b", "--debug").stderr


def test_a_port_in_use_is_named_before_ray_is_started() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = kajiya("up", "--port", port)
    assert done.returncode == 2
    assert f"Port {port}" in done.stderr
    assert "--port" in done.stderr


def test_a_home_that_cannot_be_written_is_named_before_ray_is_started(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = kajiya("up", "--dashboard-port", "18265", "--port", "18000", KAJIYA_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 2
    assert "set KAJIYA_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_the_embedded_model() -> None:
    assert "SmolLM2-135M-Instruct" in kajiya("doctor").stdout
