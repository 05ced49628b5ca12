"""The specification's tables: quantization by size, LoRA by size, batch sizes, learning rates, offload."""

from dataclasses import dataclass
from typing import Literal

SchedulerType = Literal["linear", "cosine", "constant_with_warmup"]
Source = Literal["user", "model", "size rule", "memory", "hardware"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One chosen number of a plan, with the reason."""

    field: str
    value: str
    reason: str
    source: Source


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPreset:
    """LoRA settings as PEFT's `LoraConfig` spells them, with the two training settings that the table ties to them."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]
    bias: Literal["none"] = "none"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    use_rslora: bool = False
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRatePreset:
    """Learning rate and schedule of one method; exactly one of the warm-ups is set."""

    learning_rate: float
    lr_scheduler_type: SchedulerType
    warmup_steps: int | None = None
    warmup_ratio: float | None = None

    def clamp(self, total_steps: int) -> tuple[int, str | None]:
        """Return the warm-up steps for a run of `total_steps`, and a message if the preset's had to be shortened."""
        raise NotImplementedError
