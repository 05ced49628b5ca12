"""Schedulers over a pack that trains: median stopping with more trials than slots, population-based training."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle
from ray.tune import ResultGrid
from test_pack import adapter, job_of
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard
from train_jobs.job import TrainJob
from train_jobs.pack import PackSize
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.budget import Budget
from tune_spaces.pack_plan import PackPlan
from tune_spaces.pack_worker import PackWorker
from tune_spaces.packed_trial import STATE_FILE
from tune_spaces.points import num_points
from tune_spaces.shared import Shared
from tune_spaces.trial_jobs import ADAPTER_FOLDER
from tune_spaces.tuner import quiet_ray, tuner
from tune_spaces.values import Choice, Space
from tune_spaces.watch import Outline
from tune_spaces.winner import baseline_of, best_of

pytestmark = pytest.mark.cluster
NUM_SLOTS = 3
NUM_STEPS = 12
IDLE, KEEN = 1e-7, 3e-2
"""Learning rates with which the tiny model learns nothing, and a lot."""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(scope="module")
def job(card: ModelCard) -> TrainJob:
    return job_of(card, replace(adapter(1, r=4, lr=IDLE, steps=NUM_STEPS), weight_decay=0.0, max_grad_norm=1.0))


@pytest.fixture(scope="module")
def worker(job: TrainJob) -> Iterator[ActorHandle]:
    quiet_ray()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    size = PackSize(num_slots=NUM_SLOTS, max_r=4, target_modules=job.adapters[0].spec.target_modules)
    remote = ray.remote(PackWorker).options(max_concurrency=2 * NUM_SLOTS + 3)
    yield remote.remote(replace(job, adapters=()), size, reduction_factor=4)
    ray.shutdown()


def run(
    job: TrainJob, worker: ActorHandle, folder: Path, space: Space, guess: dict[str, Any], *words: str
) -> tuple[ResultGrid, SearchRequest]:
    request = read_arguments(["--model", "m", "--data", "d", "--name", folder.name, *words])
    assert isinstance(request, SearchRequest)
    rungs = (3, 6, 9, NUM_STEPS)
    outline = Outline(
        name=folder.name,
        folder=folder,
        objective=request.objective,
        mode=request.mode,
        num_trials=num_points(space, searcher=request.searcher, trials=request.trials),
        rungs=rungs,
        reduction_factor=None,
        packs=PackPlan(num_slots=NUM_SLOTS, num_workers=1, max_r=4, memory_bytes=0),
        budget=Budget(max_time_s=None, max_gpu_hours=None),
        first_worker=None,
        hours_of="worker",
        notes=(),
    )
    shared = Shared(job=job, rungs=rungs, weight_bytes=1000, is_exact_match=False, workers=(worker,), launch=None)
    folder.mkdir()
    return tuner(request, space, shared, outline, first_guess=guess).fit(), request


def test_median_stopping_ends_bad_trials_but_not_the_plans_own(
    job: TrainJob, worker: ActorHandle, tmp_path: Path
) -> None:
    space: Space = {"learning_rate": Choice(values=(KEEN, IDLE, KEEN / 2, 2 * IDLE, KEEN / 4, KEEN / 8))}
    grid, request = run(
        job, worker, tmp_path / "median", space, {"learning_rate": IDLE}, "--searcher", "grid", "--scheduler", "median"
    )
    steps = {result.config["learning_rate"]: result.metrics["step"] for result in grid}
    assert len(steps) == 6, "every point of the grid"
    assert not grid.errors
    assert steps[IDLE] == NUM_STEPS, "the plan's own values, though the worst"
    assert steps[2 * IDLE] < NUM_STEPS
    kept = [Path(result.checkpoint.path) for result in grid]
    assert all((folder / ADAPTER_FOLDER).is_dir() for folder in kept)
    assert not any((folder / STATE_FILE).exists() for folder in kept), "all are over, nothing goes on from there"
    best = best_of(list(grid), request)
    assert best.config["learning_rate"] in (KEEN, KEEN / 2)
    baseline = baseline_of(grid, {"learning_rate": IDLE})
    assert baseline is not None
    assert best.metrics["held_out_loss"] < baseline.metrics["held_out_loss"]


def test_population_based_training_hands_weights_and_moments_to_weak_trials(
    job: TrainJob, worker: ActorHandle, tmp_path: Path
) -> None:
    space: Space = {"learning_rate": Choice(values=(2 * IDLE, KEEN))}
    words = ("--scheduler", "pbt", "--trials", "3", "--seed", "2")
    grid, _ = run(job, worker, tmp_path / "pbt", space, {"learning_rate": IDLE}, *words)
    assert not grid.errors
    (control,) = [result for result in grid if result.config == {"learning_rate": IDLE}]
    begun = control.metrics["held_out_loss"]
    histories = [list(other.metrics_dataframe["held_out_loss"]) for other in grid if other.path != control.path]
    # What the weak one's first report says depends on when it takes over.
    strong = min(history[0] for history in histories)
    assert strong < begun - 0.1, "one trial learned a lot to its first report;"
    assert all(history[-1] < strong + 0.01 for history in histories), "in the end both have what the strong one had,"
    assert list((tmp_path / "pbt").rglob("pbt_global.txt")), "as one of them took it over"
    assert all(result.metrics["step"] == NUM_STEPS for result in grid)
