"""Run a search on a cluster: workers with one base each, Ray Tune over their slots, the best into the registry."""

import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.tune import Result, ResultGrid

from cluster.memory import weights_bytes
from cluster.plan import TrainingPlan
from cluster.registry import AdapterVersion
from train_jobs.allocator import WORKER_ENV
from train_jobs.arguments import Request
from train_jobs.connection import connect
from train_jobs.interrupt import treat_sigterm_as_ctrl_c
from train_jobs.job import TrainJob
from train_jobs.pack import PackSize
from train_jobs.prepare import Data, build_job
from train_jobs.progress import announce
from train_jobs.token_carrier import carried
from train_jobs.tokens import Sample
from tune_spaces.arguments import SearchRequest
from tune_spaces.budget import Budget, ensure_a_step
from tune_spaces.halving import rungs
from tune_spaces.methods import REDUCTION_FACTOR
from tune_spaces.pack_worker import PackWorker
from tune_spaces.points import first_guess
from tune_spaces.registration import judge, register_best
from tune_spaces.report import Summary, places, write_report
from tune_spaces.shapes import SHAPE_FIELDS, Shape, job_of_shape, shape_of_plan, shapes_of
from tune_spaces.shared import Launch, Shared
from tune_spaces.store import REPORT_PAGE, new_search, notes, predicted_s, searches_folder
from tune_spaces.text import in_words
from tune_spaces.trial_jobs import default_values
from tune_spaces.trial_plan import TrialPlan
from tune_spaces.tuner import MAX_FAILURES, quiet_ray, tuner
from tune_spaces.watch import Outline
from tune_spaces.winner import baseline_of, best_of

RUNS = "runs"
"""Folder of a search with the checkpoints of trials that are runs of their own."""
FIRST_RUNG_SHARE = 16
"""The first rung is at this part of a run, where the warm-up leaves room: two halvings by four before the end."""


def run_search(
    request: SearchRequest,
    trials: TrialPlan,
    data: Data,
    samples: Mapping[int, Sequence[Sample]],
    *,
    resume: str | None,
) -> AdapterVersion:
    """Return the registered best of the search; `samples` are those to train on for each `max_length`.

    Raises:
        UserError: The data cannot be trained on, the cluster has too little, or no trial came far enough.
    """
    plan, packs = trials.plan, trials.packs
    job = build_job(as_training_request(request), plan, data)
    job = replace(job, num_threads=max(1, plan.hardware.num_cpus // (packs.num_workers * plan.num_workers)))
    if "exact_match" not in request.objectives:
        job = replace(job, questions=())  # to answer them takes as long as some trials, and nobody asked for it
    ensure_a_step(budget_of(request, plan), plan, job, num_workers=packs.num_workers)
    is_packed = trials.alone_because is None
    outline = outline_of(request, trials, job, name=resume or new_search(request))
    _announce(outline)
    quiet_ray()
    connect()
    treat_sigterm_as_ctrl_c()
    job = carried(job)
    own, jobs = jobs_by_shape(job, trials, samples)
    workers = start_workers(job, jobs, outline, use_gpu=plan.hardware.gpu is not None) if is_packed else []
    shared = Shared(
        job=job,
        rungs=outline.rungs,
        weight_bytes=weights_bytes(plan.card, plan.precision, plan.compute_dtype),
        is_exact_match="exact_match" in request.objectives,
        workers=tuple(workers),
        launch=None if is_packed else launch_of(plan, outline.folder),
        shape=own,
        jobs=jobs,
    )
    try:
        return _search(request, trials, data, shared, outline)
    finally:
        for worker in workers:
            ray.kill(worker)


def jobs_by_shape(
    job: TrainJob, trials: TrialPlan, samples: Mapping[int, Sequence[Sample]]
) -> tuple[Shape | None, dict[Shape, TrainJob]]:
    """Return the plan's own shape and the job of every shape that trials may have; nothing where all are of one."""
    if not set(SHAPE_FIELDS) & set(trials.space):
        return None, {}
    own = shape_of_plan(trials.plan)
    shapes = shapes_of(own, trials.space)
    jobs = {s: job_of_shape(job, s, samples, num_workers=trials.plan.num_workers) for s in shapes}
    return own, {shape: carried(shaped) for shape, shaped in jobs.items()}


def launch_of(plan: TrainingPlan, folder: Path) -> Launch:
    """Return what a trial that is a run of its own needs."""
    return Launch(folder=folder / RUNS, num_workers=plan.num_workers, use_gpu=plan.hardware.gpu is not None)


def _search(request: SearchRequest, trials: TrialPlan, data: Data, shared: Shared, outline: Outline) -> AdapterVersion:
    begin_s = time.monotonic()
    guess = first_guess(trials.space, default_values(shared.default, shared.shape))
    grid = tuner(request, trials.space, shared, outline, first_guess=guess).fit()
    best = best_of(list(grid), request, errors=grid.errors)
    baseline = baseline_of(grid, guess)
    judgement = judge(shared, best, baseline)
    version = register_best(request, trials.plan, data, shared, best, judgement)
    summary = Summary(
        name=outline.name,
        request=request,
        results=tuple(grid),
        best=best,
        baseline=baseline,
        judgement=judgement,
        version=version.served_name,
        spent_s=outline.spent_before_s + time.monotonic() - begin_s,
        predicted_s=predicted_s(outline.folder),
        packs=outline.packs,
        is_packed=shared.launch is None,
    )
    page = outline.folder / REPORT_PAGE
    write_report(summary, page)
    _drop_checkpoints(grid)
    shutil.rmtree(outline.folder / RUNS, ignore_errors=True)
    announce("report", f"report: {page}", path=str(page))
    return version


def budget_of(request: SearchRequest, plan: TrainingPlan) -> Budget:
    """Return what the search may spend; hours are those of a whole trial where that has several workers."""
    hours = None if request.max_gpu_hours is None else request.max_gpu_hours / plan.num_workers
    return Budget(max_time_s=request.max_time_s, max_gpu_hours=hours)


def outline_of(request: SearchRequest, trials: TrialPlan, job: TrainJob, *, name: str) -> Outline:
    """Return what is known of the search before its first step; after a crash, with what was reported before."""
    folder = searches_folder() / name
    return Outline(
        name=name,
        folder=folder,
        first_worker=f"{name}-{secrets.token_hex(2)}" if trials.alone_because is None else None,
        objective=request.objective,
        mode=request.mode,
        num_trials=trials.num_trials,
        rungs=rungs_of(request, job),
        reduction_factor=REDUCTION_FACTOR if request.scheduler == "asha" else None,
        num_kept=1 if request.baseline else 0,
        packs=trials.packs,
        budget=budget_of(request, trials.plan),
        hours_of="GPU" if trials.plan.hardware.gpu else "worker",
        notes=tuple(notes(folder)),
    )


def _announce(outline: Outline) -> None:
    packs = outline.packs
    where = places(packs, is_packed=outline.first_worker is not None)
    budget = f", at most {outline.budget}" if str(outline.budget) else ""
    begun = f" It goes on after {in_words(outline.spent_before_s)}." if outline.reports else ""
    announce(
        "search",
        f"search {outline.name}: {outline.num_trials} trials of {outline.num_steps} steps{budget}, {where}."
        f"{begun} After a crash go on with --resume {outline.name}",
        search=outline.name,
        objective=outline.objective,
        mode=outline.mode,
        num_trials=outline.num_trials,
        num_steps=outline.num_steps,
        num_workers=packs.num_workers,
        hours_of=outline.hours_of,
        limit_s=outline.budget.limit_s(packs.num_workers),
        before=outline.notes,
    )


def as_training_request(request: SearchRequest) -> Request:
    """Return what a fine-tuning run of one trial would be asked for."""
    return Request(
        model=request.model,
        data=request.data,
        name=request.name,
        eval_data=request.eval_data,
        epochs=request.epochs,
        max_steps=request.max_steps,
        method=request.method,
        precision=request.precision,
        max_length=request.max_length,
        train_on="all",
        num_workers=request.workers_per_trial,
        seed=request.seed,
        overrides=request.overrides,
    )


def start_workers(
    job: TrainJob, jobs: Mapping[Shape, TrainJob], outline: Outline, *, use_gpu: bool
) -> list[ActorHandle]:
    """Return the workers, whose bases are being loaded."""
    spec, packs = job.adapters[0].spec, outline.packs
    size = PackSize(num_slots=packs.num_slots, max_r=packs.max_r, target_modules=spec.target_modules)
    options: dict[str, Any] = {
        "num_cpus": 1,
        "num_gpus": 1 if use_gpu else 0,
        "max_concurrency": 2 * packs.num_slots + 3,
        "max_restarts": MAX_FAILURES,
        "runtime_env": {"env_vars": WORKER_ENV},
    }
    remote = ray.remote(PackWorker)
    empty = replace(job, adapters=())
    others = {shape: replace(other, adapters=()) for shape, other in jobs.items()}
    names = [outline.first_worker, *(None for _ in range(1, packs.num_workers))]
    return [
        remote.options(name=name, **options).remote(empty, size, reduction_factor=REDUCTION_FACTOR, jobs=others)
        for name in names
    ]


def rungs_of(request: SearchRequest, job: TrainJob) -> tuple[int, ...]:
    """Return the steps at which trials report: after the warm-up, and as often as the scheduler has use for it."""
    num_steps = job.adapters[0].num_steps
    first = min(num_steps, max(job.adapters[0].num_warmup_steps + 1, -(-num_steps // FIRST_RUNG_SHARE)))
    match request.scheduler:
        case "fifo":
            return (num_steps,)
        case "asha":
            return rungs(num_steps, first=first, reduction_factor=REDUCTION_FACTOR)
        case _:
            return tuple(sorted({*range(first, num_steps, max(first, num_steps // 8)), num_steps}))


def _drop_checkpoints(results: Sequence[Result] | ResultGrid) -> None:
    """Delete the adapters of all trials: the best one is in the registry, and together they are large."""
    for result in results:
        for folder in Path(result.path).glob("checkpoint_*"):
            shutil.rmtree(folder, ignore_errors=True)
