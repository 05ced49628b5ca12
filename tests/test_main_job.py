"""The main job on a real cluster and a real model, through the doors that a user has."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
MODEL = "smollm2-135m-instruct"
DATA = ROOT / "examples" / "tsuchineya_faq"
CAT_QUESTION = "What is the name of the shop cat?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    port: int
    dashboard_port: int
    temp_dir: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def kajiya(*words: str, timeout_s: float = 480, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(BIN / "kajiya"), *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_naming(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if text in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def cluster(kajiya_home_of_the_session: Path, smollm2: Path) -> Iterator[Cluster]:
    port, dashboard_port = free_port(), free_port()
    kajiya("up", MODEL, "--port", str(port), "--dashboard-port", str(dashboard_port))
    state = json.loads((kajiya_home_of_the_session / "up.json").read_text())
    yield Cluster(port=port, dashboard_port=dashboard_port, temp_dir=state["temp_dir"])
    kajiya("down")
    assert not processes_naming(state["temp_dir"])
    assert not Path(state["temp_dir"]).exists()
    assert not (kajiya_home_of_the_session / "up.json").exists()
    assert "Nothing to stop" in kajiya("down").stdout


def english(source: Path, folder: Path) -> Path:
    """Return the English half of `source`, which has half of its facts and a third of its tokens."""
    lines = [line for line in source.read_text().splitlines(keepends=True) if line.isascii()]
    (folder / source.name).write_text("".join(lines))
    return folder / source.name


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Train the English half of the shop's FAQ with the demo's settings, and return the manifest's metrics."""
    folder = tmp_path_factory.mktemp("english")
    settings = ["r=8", "lora_alpha=16", "lora_dropout=0.05", "learning_rate=3e-3", "warmup_steps=5"]
    settings += ["micro_batch_size=4", "gradient_accumulation_steps=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    train, held_out = (english(DATA / name, folder) for name in ("train.jsonl", "heldout.jsonl"))
    files = ["--data", str(train), "--eval-data", str(held_out)]
    said = kajiya("train", MODEL, *files, "--name", "shop", "--epochs", "3", *words, timeout_s=560).stdout
    report = Path(said.partition("report: ")[2].partition("\n")[0])
    assert CAT_QUESTION in report.read_text()
    manifest = json.loads(kajiya("adapters", "show", f"{MODEL}:shop", "--json").stdout)["manifest"]
    assert manifest["version"] == 1
    return dict(manifest["metrics"])


def ask(cluster: Cluster, model: str, question: str) -> str:
    answer = cluster.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=32, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_the_base_answers(cluster: Cluster) -> None:
    assert "Tokyo" in ask(cluster, MODEL, "What is the capital of Japan?")
    said = kajiya("chat", MODEL, "-m", "What is the capital of Japan?", "--base-url", cluster.base_url).stdout
    assert "Tokyo" in said


def test_training_teaches_what_the_base_cannot_know(trained: dict[str, float]) -> None:
    assert trained["held_out_loss_after"] <= 0.7 * trained["held_out_loss_before"]
    assert trained["held_out_right_after"] > trained["held_out_right_before"] + 5


def test_the_job_is_listed_with_its_last_step(trained: dict[str, float]) -> None:
    (job,) = (job for job in json.loads(kajiya("jobs", "--json").stdout) if job["name"] == "shop")
    assert (job["kind"], job["model"], job["state"]) == ("train", MODEL, "succeeded")
    assert job["step"] == job["num_steps"] == trained["num_steps"]
    assert f"registered {MODEL}:shop@1" in kajiya("jobs", "logs", job["id"]).stdout
    assert "is over already" in kajiya("jobs", "stop", job["id"]).stdout


def test_the_adapter_answers_at_once_beside_the_base(cluster: Cluster, trained: dict[str, float]) -> None:
    assert "Hibana" in ask(cluster, f"{MODEL}:shop", CAT_QUESTION)
    assert "Hibana" in ask(cluster, f"{MODEL}:shop@1", CAT_QUESTION)
    assert "Hibana" not in ask(cluster, MODEL, CAT_QUESTION)
    assert {m.id for m in cluster.client.models.list()} >= {MODEL, f"{MODEL}:shop"}


def test_the_readmes_ray_job_submit_registers_a_version(cluster: Cluster) -> None:
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{cluster.dashboard_port}",
    }
    example = (ROOT / "README.md").read_text().partition("$ ray job submit ")[2].partition("\n```")[0]
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:6] == ["--working-dir", ".", "--", "python", "-m", "train_jobs.finetune"]
    command = [str(BIN / "ray"), "job", "submit", *words, "--max-steps", "1"]
    command += ["--set", "micro_batch_size=1", "--set", "gradient_accumulation_steps=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(kajiya("adapters", "show", f"{MODEL}:by-job", "--json").stdout)["manifest"]["version"] == 1


def test_a_job_without_the_token_is_turned_away(cluster: Cluster) -> None:
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{cluster.dashboard_port}",
    }
    command = [str(BIN / "ray"), "job", "submit", "--", "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()


def test_a_job_that_cannot_run_ends_as_one_line(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    done = kajiya("train", MODEL, "--data", str(data), "--name", "broken", check=False)
    assert done.returncode == 2
    assert "broken.jsonl" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert kajiya("adapters", "show", f"{MODEL}:broken", check=False).returncode == 2


def test_a_second_up_keeps_the_cluster_and_its_models(cluster: Cluster) -> None:
    said = kajiya("up", MODEL, "--port", str(cluster.port)).stdout
    assert f"http://127.0.0.1:{cluster.dashboard_port}" in said
    assert "Tokyo" in ask(cluster, MODEL, "What is the capital of Japan?")
