"""A whole search on a tiny model: its winner and the preset's own trial, each against an evaluation of ours."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from test_pack import pack_of, running
from tiny_models import tiny_llama_folder

from cluster.models.base import load_tokenizer
from cluster.registry import Registry
from train_jobs.evaluate import evaluate
from train_jobs.prepare import build_job, read_data
from train_jobs.progress import PREFIX
from train_jobs.step import train_step
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.run import as_training_request
from tune_spaces.search import check, search

pytestmark = pytest.mark.cluster
EXAMPLES = Path(__file__).parent.parent / "examples" / "tsuchineya_faq"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def lines_of(text: str, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line.partition(PREFIX)[2]) for line in text.splitlines() if PREFIX in line]
    return [line for line in lines if line["event"] == event]


def test_the_winner_and_the_presets_own_values_are_told_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama_folder(tmp_path / "tiny")
    words = ["--model", str(model), "--data", str(EXAMPLES / "train.jsonl"), "--name", "won", "--max-length", "128"]
    words += ["--eval-data", str(EXAMPLES / "heldout.jsonl"), "--trials", "3", "--max-steps", "8", "--seed", "3"]
    words += ["--set", "micro_batch_size=2", "--set", "gradient_accumulation_steps=1", "--set-space", "r=8"]
    words += ["--set-space", "micro_batch_size=1,2", "--set-space", "max_length=96,128"]
    words += ["--set-space", "learning_rate=1e-3..3e-2", "--objective", "held_out_loss,latency_ratio"]
    request = read_arguments(words)
    assert isinstance(request, SearchRequest)
    version = search(request)
    (told,) = lines_of(capsys.readouterr().out, "registered")

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
