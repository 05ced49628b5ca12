"""Fine-tune a model on chat data and register the adapter.

ray job submit -- python -m train_jobs.finetune --model smollm2-135m-instruct --data chats.jsonl --name support
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.catalog import find
from cluster.hardware import detect
from cluster.hub import ensure_available
from cluster.manifest import Manifest
from cluster.model_card import ModelCard
from cluster.plan import TrainingPlan, plan_training
from cluster.registry import AdapterVersion, check_name
from train_jobs.arguments import Request, Resume, read_arguments, read_resume
from train_jobs.command_line import run_command
from train_jobs.data import check_beginning
from train_jobs.progress import announce
from train_jobs.trackers import check_tracker

if TYPE_CHECKING:
    from train_jobs.job import TrainJob
    from train_jobs.prepare import Data
    from train_jobs.report import Finished
    from train_jobs.run_store import RunStore


def finetune(asked: Request | Resume) -> AdapterVersion | Path:
    """Plan, check, train, evaluate and register; returns the new version. A resumed run ends as it would have.

    Raises:
        UserError: Whatever the user can put right. All that is wrong with the request itself comes before a worker
            starts, and nothing is left behind.
    """
    from train_jobs.resume import RunRecord, resumed
    from train_jobs.run_store import new_run

    request, run, record = resumed(asked) if isinstance(asked, Resume) else (asked, None, None)
    plan = check(request)

    # From here on it takes seconds: torch, transformers and Ray are imported.
    from train_jobs.prepare import build_job, describe, read_data, tell_acceptance

    run = run or new_run(request.name, request.storage)
    data = read_data(request, plan)
    job = build_job(request, plan, data)
    for warning in plan.warnings:
        announce("warning", warning)
    announce("plan", describe(plan.card, plan, job))
    tell_acceptance(plan)
    if record is None:
        run.write_record(RunRecord.of(request, data.file.sha256, job).model_dump_json(indent=2).encode())
    else:
        record.check(data.file.sha256, job, run)
    announce("run", f"run {run.run}: if it is killed, go on with --resume {run.run}", run=run.run)
    return _train(request, plan, data, job, run)


def check(request: Request) -> TrainingPlan:
    """Return the plan, once all that is cheap to check has been checked.

    Raises:
        UserError: Model, name, settings or data are not what can be trained.
    """
    card = find(request.model)
    check_name(request.name)
    plan = plan_training(
        card,
        detect(),
        method=request.method,
        precision=request.precision,
        overrides=request.overrides,
        max_length=request.max_length,
        num_workers=request.num_workers,
    )
    check_tracker(request.track)
    for path in filter(None, (request.data, request.eval_data)):
        check_beginning(path)
    ensure_available(card)
    return plan


def _train(
    request: Request, plan: TrainingPlan, data: "Data", job: "TrainJob", run: "RunStore"
) -> AdapterVersion | Path:
    from train_jobs.launch import kept_until_registered, launch
    from train_jobs.loop import adapter_folder
    from train_jobs.register import origin, register
    from train_jobs.report import Finished, tell_report
    from train_jobs.tracking import followed

    with kept_until_registered(run), tempfile.TemporaryDirectory() as cache:
        with followed(request.track, run, plan, data) as one:
            outcome = one.outcome = launch(
                job,
                run,
                num_workers=plan.num_workers,
                min_workers=request.min_workers,
                use_gpu=plan.hardware.gpu is not None,
            )
        folder = adapter_folder(run.result(Path(cache)), 0)
        if plan.lora is None:
            manifest = origin(request.name, plan=plan, job=job, data=data, outcome=outcome)
            return _keep(folder, Finished(manifest=manifest, questions=data.questions, outcome=outcome), plan.card)
        version = register(folder, request.name, plan=plan, job=job, data=data, outcome=outcome)
    tell_report(Finished(manifest=version.manifest, questions=data.questions, outcome=outcome))
    before, after, name = outcome.before, outcome.after[0], f"{plan.card.name}:{request.name}"
    announce(
        "registered",
        f"registered {version.served_name}: held-out loss {before.loss:.4f} -> {after.loss:.4f}. "
        f"It is served as {name}; ask it with `kajiya chat {name}`",
        version=version.served_name,
    )
    return version


def _keep(weights: Path, finished: "Finished", card: ModelCard) -> Path:
    from train_jobs.full_models import MANIFEST_FILE, keep_model
    from train_jobs.report import tell_report

    folder = keep_model(weights, card, finished.manifest)
    kept = replace(finished, manifest=Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes()))
    tell_report(kept)
    before, after = finished.outcome.before, finished.outcome.after[0]
    announce(
        "registered",
        f"wrote the model {kept.served_name} to {folder}: held-out loss {before.loss:.4f} -> {after.loss:.4f}. "
        f"Serve it with `kajiya up {kept.served_name}`",
        version=str(folder),
    )
    return folder


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return run_command(
        lambda words: finetune(read_resume(words) or read_arguments(words)), argv, when_stopped="nothing was registered"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
