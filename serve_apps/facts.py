"""What the ingress knows of a served model without asking its replicas."""

from dataclasses import dataclass

from cluster.plan import Engine, ServingPlan
from serve_apps.args import ModelArgs


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """One served base model, as it was planned."""

    name: str
    model_id: str
    revision: str | None
    precision: str
    engine: Engine
    max_model_len: int
    """Tokens of prompt and answer together."""
    max_num_seqs: int
    """Requests in the batch of one replica."""
    max_loras: int
    """Adapters in the memory of one replica."""
    num_gpus: float = 0.0
    """GPUs of one replica, or its share of one; 0 on a CPU."""
    accelerator_type: str | None = None
    """The kind of GPU it is planned for, as Ray names it."""
    wake_timeout_s: float
    """How long a request may wait for a replica with room."""


def facts_of(plan: ServingPlan, wish: ModelArgs) -> ModelFacts:
    """Return what `plan` and `wish` say of their model."""
    return ModelFacts(
        name=plan.card.name,
        model_id=plan.card.model_id,
        revision=plan.card.revision,
        precision=plan.precision,
        engine=plan.engine,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_loras=plan.max_loras,
        num_gpus=plan.num_gpus,
        accelerator_type=plan.hardware.gpu.name if plan.hardware.gpu else None,
        wake_timeout_s=wish.wake_timeout_s,
    )
