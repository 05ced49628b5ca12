"""Runs on Ray Train's workers: two equal one, a killed one loses nothing, DeepSpeed agrees."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from test_pack import adapter, job_of, losses_of
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.errors import UserError
from cluster.models.bank import AdapterBank
from cluster.models.base import load_base
from train_jobs.checkpoint import adapter_folder
from train_jobs.job import Question, TrainJob
from train_jobs.launch import TooFewResourcesError, launch, run_folder
from train_jobs.loop import Outcome

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    card = find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))
    prompt = tuple(byte_tokenizer()("<|im_start|>").input_ids)
    question = Question(prompt_ids=prompt, answer_contains="\ufffe", max_new_tokens=3)
    plain = job_of(card, adapter(1, dropout=0.1, steps=30), accumulation=2)
    return replace(plain, questions=(question,) * 3, checkpoint_steps=3)


def outcome_of(job: TrainJob, *, num_workers: int = 2) -> Outcome:
    with run_folder("test") as folder:
        return launch(job, folder, num_workers=num_workers, use_gpu=False)[0]


@pytest.fixture(scope="module")
def undisturbed(job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with run_folder("test") as folder:
        outcome, checkpoint = launch(job, folder, num_workers=2, use_gpu=False)
        model = load_base(job.card, precision="fp32").model
        spec = AdapterBank(model, num_slots=1, max_r=4, target_modules=job.adapters[0].spec.target_modules).load_slot(
            0, adapter_folder(checkpoint, 0)
        )
    assert spec.r == 4
    assert not folder.exists()
    return outcome


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


def kill_a_worker_after(folder: Path, num_checkpoints: int) -> list[int]:
    """Kill a training worker once `folder` holds so many checkpoints, in the background; returns the killed ids."""
    killed: list[int] = []

    def watch() -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            if len(list(folder.glob("checkpoint_*"))) >= num_checkpoints:
                family = psutil.Process().children(recursive=True)
                worker = next(p for p in family if "RayTrainWorker" in " ".join(p.cmdline()))
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)
                return
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    return killed


def test_a_killed_worker_costs_nothing_but_time(job: TrainJob, undisturbed: Outcome) -> None:
    with run_folder("test") as folder:
        killed = kill_a_worker_after(folder, 2)
        outcome, _ = launch(job, folder, num_workers=2, use_gpu=False)
    assert len(killed) == 1
    # Equal but for the last bit: a product of MKL's depends on how its inputs lie in memory, which differs by process.
    assert losses(outcome) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert outcome.before.loss == pytest.approx(undisturbed.before.loss, rel=1e-6)
    assert outcome.after[0].loss == pytest.approx(undisturbed.after[0].loss, rel=1e-6)
    assert outcome.after[0].answers == undisturbed.after[0].answers


def test_deepspeed_agrees_with_plain_data_parallelism(job: TrainJob, undisturbed: Outcome) -> None:
    pytest.importorskip("deepspeed")
    zero: dict[str, object] = {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1_000_000,
    }
    assert losses(outcome_of(replace(job, deepspeed_zero=zero))) == pytest.approx(losses(undisturbed), abs=1e-4)


def test_what_a_worker_refuses_is_one_line_and_is_not_tried_again(job: TrainJob) -> None:
    hot = replace(job.adapters[0], learning_rate=1e30, num_warmup_steps=0)
    started_s = time.monotonic()
    with pytest.raises(UserError, match=r"The loss is .* at step .*Try a lower rate") as caught:
        outcome_of(replace(job, adapters=(hot,), questions=()), num_workers=1)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started_s < 60


def test_more_workers_than_cores_are_refused_before_anything_starts(job: TrainJob) -> None:
    with pytest.raises(TooFewResourcesError, match="3 workers need 3 CPUs; the Ray cluster has 2"):
        outcome_of(job, num_workers=3)
