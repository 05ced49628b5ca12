"""Turn a finished run into a version in the registry."""

import importlib.metadata
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from cluster.manifest import DataSource, Manifest
from cluster.models.fingerprint import base_fingerprint
from cluster.plan import TrainingPlan
from cluster.registry import AdapterVersion, Registry
from train_jobs.job import TrainJob
from train_jobs.loop import Outcome
from train_jobs.prepare import Data

LIBRARIES = ("kajiya", "torch", "transformers", "peft", "accelerate", "ray", "bitsandbytes")


def register(
    folder: Path,
    name: str,
    *,
    plan: TrainingPlan,
    job: TrainJob,
    data: Data,
    outcome: Outcome,
    promote: bool = True,
) -> AdapterVersion:
    """Add the adapter in `folder` to the registry, with everything that tells where it came from."""
    return Registry.default().add(folder, origin(name, plan=plan, job=job, data=data, outcome=outcome), promote=promote)


def origin(name: str, *, plan: TrainingPlan, job: TrainJob, data: Data, outcome: Outcome) -> Manifest:
    """Return what is to be known of where an adapter or a model came from."""
    card = plan.card
    return Manifest(
        model=card.name,
        name=name,
        base_model_id=card.model_id,
        base_revision=card.revision,
        base_fingerprint=base_fingerprint(card),
        precision=plan.precision,
        adapter=asdict(job.adapters[0].spec) | {"target_modules": list(job.adapters[0].spec.target_modules)},
        plan=plan.to_json(),
        data=DataSource(
            file=data.file.name,
            sha256=data.file.sha256,
            num_samples=len(data.train.samples),
            num_trained_tokens=data.train.num_trained_tokens,
        ),
        metrics=_metrics(job, outcome),
        library_versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _metrics(job: TrainJob, outcome: Outcome) -> dict[str, float]:
    before, after = outcome.before, outcome.after[0]
    duration_s = sum(step.duration_s for step in outcome.history)
    best = {"best_step": float(outcome.best.step)} if outcome.best else {}
    return best | {
        "held_out_loss_before": before.loss,
        "held_out_loss_after": after.loss,
        "held_out_right_before": before.num_right,
        "held_out_right_after": after.num_right,
        "held_out_questions": after.num_questions,
        "training_loss": outcome.history[-1].losses[0],
        "num_steps": len(outcome.history),
        "tokens_per_s": sum(step.num_tokens for step in outcome.history) / duration_s,
        "training_s": duration_s,
        "seed": job.adapters[0].seed,
    }
