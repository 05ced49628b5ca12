"""Trials that are Ray Train runs of their own, two workers each: from rung to rung they equal a run in one go."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import tune
from test_pack import adapter, job_of, losses_of
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.budget import Budget
from tune_spaces.launched_trial import LaunchedTrial, read_outcome
from tune_spaces.pack_plan import PackPlan
from tune_spaces.registration import judge
from tune_spaces.shared import Launch, Shared
from tune_spaces.trial import DIVERGED_LOSS
from tune_spaces.tuner import quiet_ray, tuner
from tune_spaces.values import Choice
from tune_spaces.watch import Outline
from tune_spaces.winner import adapter_files, baseline_of, best_of

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


def shared_of(card: ModelCard, folder: Path) -> Shared:
    return Shared(
        job=job_of(card, adapter(1, r=8, dropout=0.1)),
        rungs=(3, 8),
        weight_bytes=1000,
        is_exact_match=False,
        workers=(),
        launch=Launch(folder=folder, num_workers=2, use_gpu=False),
    )


def test_a_trial_goes_on_from_rung_to_rung_as_in_one_run(card: ModelCard, tmp_path: Path) -> None:
    shared = shared_of(card, tmp_path / "runs")
    # four samples a step, two for each of two workers: as one process in two micro-batches
    alone = [loss for (loss,) in losses_of(job_of(card, adapter(1, r=8, dropout=0.1), accumulation=2))]
    trial = tune.with_parameters(LaunchedTrial, shared=shared)(config={"r": 8, "learning_rate": 1e-2})
    first = trial.train()
    assert first["losses"] == pytest.approx(alone[:3], abs=1e-5)
    assert (first["step"], first["done"]) == (3, False)
    (tmp_path / "kept").mkdir()
    trial.save_checkpoint(str(tmp_path / "kept"))
    assert read_outcome(tmp_path / "kept")[0] == 3
    assert (tmp_path / "kept" / "adapter" / "adapter_model.safetensors").is_file()

    trial.reset_config({"r": 8, "learning_rate": 1e-2})  # as for another trial, and back
    trial.load_checkpoint(str(tmp_path / "kept"))
    last = trial.train()
    assert last["losses"] == pytest.approx(alone[3:], abs=1e-5)
    assert (last["step"], last["done"]) == (8, True)


def test_a_trial_that_diverges_says_so_and_is_over(card: ModelCard, tmp_path: Path) -> None:
    trial = tune.with_parameters(LaunchedTrial, shared=shared_of(card, tmp_path))(config={"learning_rate": 1e30})
    result = trial.train()
    assert (result["held_out_loss"], result["done"]) == (DIVERGED_LOSS, True)
    (tmp_path / "kept").mkdir()
    trial.save_checkpoint(str(tmp_path / "kept"))
    assert not list((tmp_path / "kept").iterdir()), "there is nothing to keep"


def test_ray_tune_leaves_every_core_to_the_workers_of_a_trial(card: ModelCard, tmp_path: Path) -> None:
    request = read_arguments(["--model", "m", "--data", "d", "--name", "n", "--trials", "1", "--scheduler", "fifo"])
    assert isinstance(request, SearchRequest)
    folder = tmp_path / "search"
    folder.mkdir()
    outline = Outline(
        name=folder.name,
        folder=folder,
        objective="held_out_loss",
        mode="min",
        num_trials=1,
        rungs=(4,),
        reduction_factor=None,
        packs=PackPlan(num_slots=1, num_workers=1, max_r=8, memory_bytes=0),
        budget=Budget(max_time_s=None, max_gpu_hours=None),
        hours_of="worker",
        first_worker=None,
        notes=(),
    )
    shared = replace(shared_of(card, tmp_path / "runs"), rungs=(4,))
    quiet_ray()
    guess = {"learning_rate": 1e-3}
    grid = tuner(request, {"learning_rate": Choice(values=(1e-3, 1e-2))}, shared, outline, first_guess=guess).fit()
    assert not grid.errors
    best = best_of(list(grid), request)
    assert (best.config, best.metrics["step"]) == (guess, 4)
    judgement = judge(shared, best, baseline_of(grid, guess))
    assert judgement.best.loss == judgement.baseline_loss == best.metrics["held_out_loss"]
    assert judgement.base.loss != judgement.best.loss
    assert "adapter_model.safetensors" in adapter_files(best)
