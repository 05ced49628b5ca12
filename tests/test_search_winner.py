"""A whole search on a tiny model: its winner and the preset's own trial, each against an evaluation of ours.

The winner answers over HTTP at once, and a search whose worker and driver were killed ends with the same one.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from serving import serving
from test_pack import pack_of, running
from tiny_models import tiny_llama_folder

from cluster.models.base import load_tokenizer
from cluster.registry import AdapterVersion, Registry
from serve_apps.args import ModelArgs, ServeArgs
from train_jobs.evaluate import evaluate
from train_jobs.prepare import build_job, read_data
from train_jobs.progress import PREFIX
from train_jobs.step import train_step
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.run import as_training_request
from tune_spaces.search import check, main, search

pytestmark = pytest.mark.cluster
EXAMPLES = Path(__file__).parent.parent / "examples" / "tsuchineya_faq"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def url(model: Path) -> Iterator[str]:
    with serving(ServeArgs(models=[ModelArgs(model=str(model), max_model_len=256)])) as address:
        yield address


def words_of(model: Path, name: str) -> list[str]:
    words = ["--model", str(model), "--data", str(EXAMPLES / "train.jsonl"), "--name", name, "--max-length", "128"]
    words += ["--eval-data", str(EXAMPLES / "heldout.jsonl"), "--trials", "3", "--max-steps", "8", "--seed", "3"]
    words += ["--set", "micro_batch_size=2", "--set", "gradient_accumulation_steps=1", "--set-space", "r=8"]
    words += ["--set-space", "micro_batch_size=1,2", "--set-space", "max_length=96,128"]
    return [*words, "--set-space", "learning_rate=1e-3..3e-2", "--objective", "held_out_loss,latency_ratio"]


@pytest.fixture(scope="module")
def undisturbed(model: Path, url: str) -> tuple[AdapterVersion, dict[str, Any]]:
    """The winner, and what was said of it."""
    request = read_arguments(words_of(model, "won"))
    assert isinstance(request, SearchRequest)
    said = io.StringIO()
    with redirect_stdout(said):
        version = search(request)
    (told,) = lines_of(said.getvalue(), "registered")
    return version, told


def lines_of(text: str, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line.partition(PREFIX)[2]) for line in text.splitlines() if PREFIX in line]
    return [line for line in lines if line["event"] == event]


def test_the_winner_and_the_presets_own_values_are_told_as_they_are(
    model: Path, undisturbed: tuple[AdapterVersion, dict[str, Any]]
) -> None:
    request = read_arguments(words_of(model, "won"))
    assert isinstance(request, SearchRequest)
    version, told = undisturbed
    plan = check(request)
    data = read_data(as_training_request(request), plan)
    job = replace(build_job(as_training_request(request), plan, data), questions=())
    assert job.adapters[0].learning_rate == 2e-4, "the preset's, which the space begins above"
    # Of the space, its nearest point is 1e-3, and the search's first trial.
    own = replace(job, adapters=(replace(job.adapters[0], learning_rate=1e-3),))
    pack = pack_of(own)
    for step in range(8):
        train_step(pack, running(pack, step))
    tokenizer = load_tokenizer(plan.card)
    assert told["baseline_loss"] == pytest.approx(evaluate(pack, tokenizer, slot=0).loss, abs=1e-5)

    pack.adapters.load_slot(0, Registry.default().fetch(version))
    loss = evaluate(pack, tokenizer, slot=0).loss
    assert told["loss"] == pytest.approx(loss, abs=1e-6)
    assert version.manifest.metrics["held_out_loss_after"] == pytest.approx(loss, abs=1e-6)
    assert isinstance(told["baseline_loss"], float)
    assert loss < told["baseline_loss"]


def test_the_winner_answers_at_once_under_its_name(
    model: Path, url: str, undisturbed: tuple[AdapterVersion, dict[str, Any]]
) -> None:
    version, _ = undisturbed
    body = {
        "model": f"{model.name}:won",
        "messages": [{"role": "user", "content": "休みの日は?"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-kajiya-adapter"] == f"won@{version.manifest.version}"


def test_a_search_whose_worker_and_driver_were_killed_ends_with_the_same_winner(
    model: Path, undisturbed: tuple[AdapterVersion, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = undisturbed
    command = [sys.executable, "-m", "tune_spaces.search", *words_of(model, "again")]
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": address})
    assert driver.stdout is not None
    said: list[str] = []
    is_worker_killed = False
    for line in driver.stdout:
        said.append(line)
        if lines_of(line, "trial") and not is_worker_killed:
            (worker,) = processes_called("ray::PackWorker")
            worker.kill()
            is_worker_killed = True
        if lines_of(line, "trial_recover"):
            break
    driver.kill()
    driver.wait()
    assert is_worker_killed, "".join(said)
    (opened,) = lines_of("".join(said), "search")
    assert main(["--resume", opened["search"]]) == 0
    (again,) = lines_of(capsys.readouterr().out, "registered")
    assert again["loss"] == pytest.approx(told["loss"], abs=1e-5)
    assert again["baseline_loss"] == pytest.approx(told["baseline_loss"], abs=1e-5)
    assert again["config"] == told["config"]


def processes_called(name: str) -> list[psutil.Process]:
    """Return processes of this test's own Ray."""
    return [one for one in psutil.Process().children(recursive=True) if (one.cmdline() or [""])[0].startswith(name)]
