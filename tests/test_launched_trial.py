"""Trials that are Ray Train runs of their own, two workers each: from rung to rung they equal a run in one go."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import tune
from test_pack import adapter, job_of, losses_of
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard
from tune_spaces.launched_trial import LaunchedTrial, read_outcome
from tune_spaces.shared import Launch, Shared
from tune_spaces.trial import DIVERGED_LOSS

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
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
