"""How a model is fine-tuned on given hardware."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.hardware import Hardware
from cluster.memory import MemoryTable
from cluster.model_card import ModelCard, Precision
from cluster.plan_serving import DType
from cluster.presets import Decision, LearningRatePreset, LoraPreset

Method = Literal["full", "lora", "qlora"]
Strategy = Literal["ddp", "deepspeed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """Every number that a fine-tuning run of one model needs."""

    card: ModelCard
    hardware: Hardware
    method: Method
    precision: Precision
    compute_dtype: DType
    lora: LoraPreset | None
    """None for full fine-tuning."""
    learning_rate_preset: LearningRatePreset
    micro_batch_size: int
    """Samples per worker in one forward pass."""
    gradient_accumulation_steps: int
    num_workers: int
    max_length: int
    """Tokens per sample, the longest that is trained."""
    strategy: Strategy
    zero_stage: int
    """DeepSpeed's ZeRO stage; 0 with strategy "ddp"."""
    offload_optimizer: bool
    offload_gradients: bool
    offload_param: bool
    gradient_checkpointing: bool
    memory: MemoryTable
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate."""
        return self.learning_rate_preset.learning_rate

    @property
    def lr_scheduler_type(self) -> str:
        """Return the schedule's name in transformers."""
        return self.learning_rate_preset.lr_scheduler_type

    @property
    def effective_batch_size(self) -> int:
        """Return the samples per optimizer step: micro batch x accumulation x workers."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_workers

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON types."""
        raise NotImplementedError


def plan_training(
    card: ModelCard,
    hardware: Hardware,
    *,
    method: Method | None = None,
    precision: Precision | None = None,
    overrides: Mapping[str, object] | None = None,
    max_length: int | None = None,
    num_workers: int | None = None,
) -> TrainingPlan:
    """Return how `card` is fine-tuned on `hardware`.

    Raises:
        DoesNotFit: nothing within the given wishes fits; the text holds the sum and the nearest options.
    """
    raise NotImplementedError
