"""From one point of a space to the adapter that is trained for it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cluster.memory import num_lora_parameters
from cluster.model_card import ModelCard
from cluster.plan import TrainingPlan
from tune_spaces.objectives import latency_ratio
from tune_spaces.shapes import Shape
from tune_spaces.spaces import ATTENTION

if TYPE_CHECKING:  # it imports torch
    from cluster.models.adapter_spec import AdapterSpec
    from train_jobs.job import AdapterJob

ADAPTER_FOLDER = "adapter"
"""Of a trial's checkpoint."""

SPEC_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
RUN_FIELDS = ("learning_rate", "weight_decay", "max_grad_norm", "neftune_noise_alpha", "lr_scheduler_type", "seed")


def adapter_job(default: "AdapterJob", config: Mapping[str, Any]) -> "AdapterJob":
    """Return `default`, the job of the plan itself, with what `config` says."""
    return replace(
        default,
        spec=_spec(default.spec, config),
        **{field: config[field] for field in RUN_FIELDS if field in config},
    )


def _spec(default: "AdapterSpec | None", config: Mapping[str, Any]) -> Any:
    if default is None:  # full fine-tuning
        return None
    spec = replace(default, **{field: config[field] for field in SPEC_FIELDS if field in config})
    if config.get("targets") == "attention":
        spec = replace(spec, target_modules=attention_of(spec.target_modules))
    return spec


def attention_of(target_modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `target_modules` that belong to attention."""
    return tuple(target for target in target_modules if target in ATTENTION)


def adapter_bytes(plan: TrainingPlan, *, r: int) -> int:
    """Return what one trial adds to the base: fp32 value, gradient and two Adam moments of each adapter weight."""
    assert plan.lora is not None
    return 16 * num_lora_parameters(plan.card, r=r, target_modules=plan.lora.target_modules)


def size_metrics(card: ModelCard, job: "AdapterJob", *, weight_bytes: int) -> dict[str, Any]:
    """Return what a trial reports of its adapter without training it, on a base of `weight_bytes`; a whole model takes
    the place of the base.
    """
    spec: AdapterSpec | None = job.spec
    if spec is None:
        return {"adapter_bytes": 4 * card.num_parameters(), "latency_ratio": 1.0}
    num_bytes = 4 * num_lora_parameters(card, r=spec.r, target_modules=spec.target_modules)
    return {
        "adapter_bytes": num_bytes,
        "latency_ratio": latency_ratio(weight_bytes=weight_bytes, adapter_bytes=num_bytes),
    }


def default_values(job: "AdapterJob", shape: Shape | None = None) -> dict[str, Any]:
    """Return the plan's own choice, by field of a space; `shape` is None where the space has no field of it."""
    spec: AdapterSpec | None = job.spec
    values: dict[str, Any] = {field: getattr(job, field) for field in RUN_FIELDS}
    values |= asdict(shape) if shape is not None else {}
    if spec is not None:
        values |= {field: getattr(spec, field) for field in SPEC_FIELDS} | {"targets": "all"}
    return values
