"""Runs on Ray Train's workers: two equal one, a killed one loses nothing, DeepSpeed agrees."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from test_loop import Killed, die_at
from test_pack import adapter, job_of, losses_of, pack_of
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.hardware import detect
from cluster.models.bank import AdapterBank
from cluster.models.base import load_base
from cluster.plan import plan_training
from cluster.registry import Registry
from train_jobs import loop
from train_jobs.arguments import read_arguments
from train_jobs.finetune import main
from train_jobs.job import Question, TrainJob
from train_jobs.launch import RunRefused, TooFewResourcesError, launch
from train_jobs.loop import Outcome, adapter_folder
from train_jobs.prepare import build_job, read_data
from train_jobs.run_store import RunStore

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    card = find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))
    prompt = tuple(byte_tokenizer()("<|im_start|>").input_ids)
    question = Question(prompt_ids=prompt, answer_contains="\ufffe", max_new_tokens=3)
    plain = job_of(card, adapter(1, dropout=0.1, steps=30), accumulation=2)
    return replace(plain, questions=(question,) * 3, checkpoint_steps=3)


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    return new_store(tmp_path)


def new_store(folder: Path) -> RunStore:
    return store_at(folder / "test")


def store_at(folder: Path) -> RunStore:
    made = RunStore(root=str(folder.parent), run=folder.name)
    made.write_record(b"{}")
    return made


def outcome_of(job: TrainJob, run: RunStore, *, num_workers: int = 2) -> Outcome:
    return launch(job, run, num_workers=num_workers, use_gpu=False)


@pytest.fixture(scope="module")
def undisturbed(job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = new_store(tmp_path_factory.mktemp("undisturbed"))
    outcome = outcome_of(job, run)
    model = load_base(job.card, precision="fp32").model
    spec = AdapterBank(model, num_slots=1, max_r=4, target_modules=job.adapters[0].spec.target_modules).load_slot(
        0, adapter_folder(run.result(Path("unused")), 0)
    )
    assert spec.r == 4
    assert run.steps() == [27, 30]
    assert launch(replace(job, samples=()), run, num_workers=99, use_gpu=False) == outcome  # nothing is trained again
    return outcome


def run_here(job: TrainJob, run: RunStore) -> Outcome:
    """Train in this process, as one worker without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.get_preemption_info", lambda: None)
        return loop.run(pack_of(job), byte_tokenizer(), run)


def same(expected: object) -> object:
    """Equal to the bit; but for the last one without AVX-512.

    MKL's products depend there on how their inputs lie in memory, which differs by process.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return expected
    return pytest.approx(expected, rel=1e-6)


def losses(outcome: Outcome) -> list[float]:
    return [step.losses[0] for step in outcome.history]


def test_two_workers_equal_one_process(job: TrainJob, undisturbed: Outcome) -> None:
    # two workers with two micro-batches each, against four micro-batches: the same samples a step
    expected = [loss for (loss,) in losses_of(replace(job, gradient_accumulation_steps=4))]
    assert losses(undisturbed) == pytest.approx(expected, abs=1e-5)
    assert len(expected) == 30


def test_both_evaluations_see_the_whole_held_out_part(undisturbed: Outcome) -> None:
    assert undisturbed.before.loss > 0
    assert undisturbed.after[0].loss != undisturbed.before.loss
    for evaluation in (undisturbed.before, *undisturbed.after):
        assert (evaluation.num_right, evaluation.num_questions) == (0, 3)
        assert len(evaluation.answers) == 3


def kill_a_worker_after(run: RunStore, step: int) -> list[int]:
    """Kill a training worker once `run` has a checkpoint after `step`, in the background; returns the killed ids."""
    killed: list[int] = []

    def watch() -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            if max(run.steps(), default=0) >= step:
                family = psutil.Process().children(recursive=True)
                worker = next(p for p in family if "RayTrainWorker" in " ".join(p.cmdline()))
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)
                return
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    return killed


def test_a_killed_worker_costs_nothing_but_time(job: TrainJob, run: RunStore, undisturbed: Outcome) -> None:
    killed = kill_a_worker_after(run, 6)
    outcome = outcome_of(job, run)
    assert len(killed) == 1
    assert losses(outcome) == same(losses(undisturbed))
    assert [step.step for step in outcome.history] == list(range(1, 31))
    assert outcome.before.loss == same(undisturbed.before.loss)
    assert outcome.after[0].loss == same(undisturbed.after[0].loss)
    assert outcome.after[0].answers == undisturbed.after[0].answers


def test_deepspeed_goes_on_where_plain_data_parallelism_was_and_the_other_way_round(
    job: TrainJob, run: RunStore, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    zero: dict[str, object] = {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1_000_000,
    }
    job = replace(job, checkpoint_steps=8)
    with monkeypatch.context() as patch:
        die_at(9, patch)
        with pytest.raises(Killed):
            run_here(job, run)  # one process
    assert run.steps() == [8]
    sharded = outcome_of(replace(job, deepspeed_zero=zero), run)  # two workers from there on
    assert losses(sharded) == pytest.approx(losses(undisturbed), abs=1e-4)
    assert run.steps() == [16, 24]
    for name in ("result", "checkpoints/s00000024"):
        shutil.rmtree(Path(run.root, run.run, name))
    assert losses(run_here(job, run)) == pytest.approx(losses(undisturbed), abs=1e-4)  # one process again
    begun = store_at(Path(run.root) / "begun-sharded")
    assert losses(outcome_of(replace(job, deepspeed_zero=zero), begun)) == pytest.approx(losses(undisturbed), abs=1e-4)
    assert begun.steps() == [16, 24]


def test_a_killed_driver_loses_nothing(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = job.card.model_id, tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}!"}] for i in range(30)]
    data.write_text("".join(f"{json.dumps({'messages': messages})}\n" for messages in turns))
    words = ["--model", model, "--data", str(data), "--name", "lasting", "--max-steps", "200", "--seed", "5"]
    words += ["--storage", str(tmp_path), "--checkpoint-steps", "3", "--set", "effective_batch_size=2"]
    driver = start_driver(words, tmp_path / "log")
    while not (
        steps := [s for f in tmp_path.glob("lasting-*") for s in RunStore(root=str(tmp_path), run=f.name).steps()]
    ):
        assert driver.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert steps[-1] < 190
    (folder,) = tmp_path.glob("lasting-*")
    assert Registry.default().names(job.card.name) == ()

    resume = ["--resume", "lasting", "--storage", str(tmp_path)]
    assert main([*resume, "--epochs", "2"]) == 2
    assert "leave out --epochs" in capsys.readouterr().err
    content = data.read_text()
    data.write_text(content.replace("Say 7", "Tell 7"))
    assert main(resume) == 2
    assert f"The data of {folder.name} has changed since it began" in capsys.readouterr().err
    data.write_text(content)
    assert main(resume) == 0
    version = Registry.default().resolve(job.card.name, "lasting")
    assert (version.version, version.manifest.metrics["num_steps"]) == (1, 200)
    assert not folder.exists()

    request = read_arguments(words)
    plan = plan_training(job.card, detect(), overrides=request.overrides)
    expected = run_here(build_job(request, plan, read_data(request, plan)), store_at(tmp_path / "here"))
    # With another number of threads than the worker's.
    assert version.manifest.metrics["held_out_loss_after"] == pytest.approx(expected.after[0].loss, rel=1e-6)
    assert version.manifest.metrics["training_loss"] == pytest.approx(expected.history[-1].losses[0], rel=1e-6)


def start_driver(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the fine-tuning job as a process of its own on this module's cluster."""
    address = ray.get_runtime_context().gcs_address
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "train_jobs.finetune", *words],
            env=os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=out,
            stderr=out,
        )


def test_what_a_worker_refuses_is_one_line_and_is_not_tried_again(job: TrainJob, run: RunStore) -> None:
    hot = replace(job.adapters[0], learning_rate=1e30, num_warmup_steps=0)
    started_s = time.monotonic()
    with pytest.raises(RunRefused, match=r"The loss is .* at step .*Try a lower rate") as caught:
        outcome_of(replace(job, adapters=(hot,), questions=()), run, num_workers=1)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started_s < 60


def test_more_workers_than_cores_are_refused_before_anything_starts(job: TrainJob, run: RunStore) -> None:
    with pytest.raises(TooFewResourcesError, match="3 workers need 3 CPUs; the Ray cluster has 2"):
        outcome_of(job, run, num_workers=3)
