"""The specification's tables: quantization by size, LoRA by size, batch sizes, learning rates, offload, DeepSpeed."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster import traps
from cluster.architectures import GATED_LINEARS
from cluster.model_card import ModelCard, Precision

SizeClass = Literal["32B+", "20B-32B", "7B-20B", "<7B"]
DType = Literal["float32", "float16", "bfloat16"]
"""torch's name of a dtype; `BitsAndBytesConfig` and vLLM take it as a string."""
Method = Literal["full", "lora", "qlora"]
Strategy = Literal["ddp", "deepspeed", "fsdp", "dp"]
PresetName = Literal["standard", "large", "medium", "small"]
SchedulerType = Literal["linear", "cosine", "constant_with_warmup"]
Source = Literal["user", "model", "size rule", "memory", "hardware", "default"]
"""Who decided; "default" where the specification is silent and nothing speaks against our own first choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One chosen value of a plan, with the reason."""

    field: str
    value: str
    reason: str
    source: Source


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRule:
    """One row of the specification's QUANTIZATION_RULES, in its words."""

    bits: Literal[4, 8] | None
    method: Literal["bnb", "auto-gptq"] | None
    compute_dtype: DType

    @property
    def precision(self) -> Precision:
        """Return what is loaded: bitsandbytes for both methods (`traps.AUTO_GPTQ`), fp32 without quantization."""
        return {4: "nf4", 8: "int8", None: "fp32"}[self.bits]  # type: ignore[return-value]  # a dict of literals widens


QUANTIZATION_RULES: dict[SizeClass, QuantizationRule] = {
    "32B+": QuantizationRule(bits=4, method="bnb", compute_dtype="float16"),
    "20B-32B": QuantizationRule(bits=8, method="bnb", compute_dtype="bfloat16"),
    "7B-20B": QuantizationRule(bits=8, method="auto-gptq", compute_dtype="float16"),
    "<7B": QuantizationRule(bits=None, method=None, compute_dtype="float32"),
}


def nominal_billions(card: ModelCard) -> int:
    """Return the size by which people call a model: its parameters rounded to whole billions.

    6.74e9 is a 7B and 32.76e9 a 33B. All experts count, since all of them are in memory.
    """
    return round(card.num_parameters() / 1e9)


def size_class(card: ModelCard) -> SizeClass:
    """Return the row of QUANTIZATION_RULES; where two rows meet, the larger one holds (32 B is "32B+")."""
    billions = nominal_billions(card)
    if billions >= 32:
        return "32B+"
    if billions >= 20:
        return "20B-32B"
    return "7B-20B" if billions >= 7 else "<7B"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPreset:
    """LoRA settings as PEFT's `LoraConfig` spells them, with the two training settings that the table ties to them."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...] = GATED_LINEARS
    bias: Literal["none"] = "none"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    use_rslora: bool = False
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354); PEFT's `create_loraplus_optimizer` takes it."""
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1


LORA_PRESETS: dict[PresetName, LoraPreset] = {
    "standard": LoraPreset(r=16, lora_alpha=32, lora_dropout=0.1),
    "large": LoraPreset(
        r=32, lora_alpha=64, lora_dropout=0.05, gradient_checkpointing=True, gradient_accumulation_steps=8
    ),
    "medium": LoraPreset(r=16, lora_alpha=32, lora_dropout=0.1, gradient_accumulation_steps=4),
    "small": LoraPreset(r=8, lora_alpha=16, lora_dropout=0.1, gradient_accumulation_steps=2),
}
"""`standard` is 標準LoRA設定, for whoever asks for it by name; the others go by size (20B+, 7B-20B, <7B)."""

RANKS = range(4, 65)
"""ランク(4-64): outside of it a plan warns."""


def lora_preset_name(card: ModelCard) -> PresetName:
    """Return the row of モデル別推奨設定 for the model's size."""
    return {"<7B": "small", "7B-20B": "medium"}.get(size_class(card), "large")  # type: ignore[return-value]  # literals


def lora_preset(card: ModelCard, name: PresetName | None = None) -> LoraPreset:
    """Return the preset called `name`, or the one for the model's size, on the linears that the model has."""
    return replace(LORA_PRESETS[name or lora_preset_name(card)], target_modules=card.target_modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRatePreset:
    """Learning rate and schedule of one method; exactly one of the warm-ups is set."""

    learning_rate: float
    lr_scheduler_type: SchedulerType
    warmup_steps: int | None = None
    warmup_ratio: float | None = None

    def clamp(self, total_steps: int) -> tuple[int, str | None]:
        """Return the warm-up steps for a run of `total_steps`, and a message where the preset's are too many."""
        if self.warmup_steps is None:
            return round((self.warmup_ratio or 0.0) * total_steps), None
        longest = int(total_steps * MAX_WARMUP_SHARE)
        if self.warmup_steps <= longest:
            return self.warmup_steps, None
        return longest, traps.warmup_clamped(self.warmup_steps, total_steps, longest)


MAX_WARMUP_SHARE = 0.1
"""Longest warm-up as a share of a run; the specification's own `warmup_ratio` for full fine-tuning."""

LEARNING_RATES: dict[Method, LearningRatePreset] = {
    "full": LearningRatePreset(learning_rate=5e-5, lr_scheduler_type="cosine", warmup_ratio=0.1),
    "lora": LearningRatePreset(learning_rate=2e-4, lr_scheduler_type="linear", warmup_steps=500),
    "qlora": LearningRatePreset(learning_rate=1e-4, lr_scheduler_type="constant_with_warmup", warmup_steps=100),
}

WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0
"""Both are transformers' own defaults (`TrainingArguments`): the specification is silent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regularization:
    """What keeps a run from leaping, and from learning its samples by heart."""

    weight_decay: float = WEIGHT_DECAY
    """AdamW's, on all weights that are trained."""
    max_grad_norm: float = MAX_GRAD_NORM
    """Longer gradients are shortened to it."""
    neftune_noise_alpha: float = 0.0
    """Noise on the embeddings of training samples (NEFTune, arXiv:2310.05914, which tries 5 to 15); 0 is none."""


BATCH_SIZES: dict[int, tuple[int, int, int]] = {
    70: (1, 2, 4),
    32: (2, 4, 8),
    22: (4, 8, 16),
    14: (8, 16, 32),
    7: (16, 32, 64),
    3: (32, 64, 128),
}
"""推奨バッチサイズ: billions of parameters -> samples at (float16, 8bit, 4bit)."""


def batch_size(card: ModelCard, precision: Precision) -> int:
    """Return the table's first guess, from the row nearest in ratio; fp32 and bf16 read the float16 column."""
    billions = max(card.num_parameters() / 1e9, 1e-3)
    row = min(BATCH_SIZES, key=lambda size: abs(math.log(size / billions)))
    column = {"int8": 1, "nf4": 2, "gptq": 2}.get(precision, 0)
    return BATCH_SIZES[row][column]


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadRule:
    """What the specification moves to the CPU for one size of model."""

    offload_layers: bool
    offload_optimizer: bool
    offload_gradients: bool


def offload_rule(model_size_gb: float) -> OffloadRule:
    """Return the row for weights of `model_size_gb` GB (1e9 bytes, at the precision that is loaded)."""
    if model_size_gb > 40:
        return OffloadRule(offload_layers=True, offload_optimizer=True, offload_gradients=True)
    if model_size_gb > 20:
        return OffloadRule(offload_layers=False, offload_optimizer=True, offload_gradients=True)
    return OffloadRule(offload_layers=False, offload_optimizer=False, offload_gradients=False)


def bitsandbytes_settings(precision: Precision, compute_dtype: DType) -> dict[str, Any]:
    """Return the keyword arguments of `BitsAndBytesConfig`; {} where nothing is quantized at load time.

    手動量子化設定, without the two 8-bit knobs that the library does not have (`traps.DEAD_8BIT_KNOBS`).
    """
    if precision == "nf4":
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_use_double_quant": True,
        }
    return {"load_in_8bit": True} if precision == "int8" else {}


def zero_optimization(*, stage: int, offload_optimizer: bool, offload_param: bool) -> dict[str, Any]:
    """Return DeepSpeed's `zero_optimization` section: the specification's JSON, with what the plan chose.

    Raises:
        ValueError: `offload_param` below stage 3, which DeepSpeed would ignore (`traps.OFFLOAD_PARAM`).
    """
    if offload_param and stage < 3:
        raise ValueError(traps.OFFLOAD_PARAM)
    cpu = {"device": "cpu", "pin_memory": True}
    return {
        "stage": stage,
        **({"offload_optimizer": cpu} if offload_optimizer else {}),
        **({"offload_param": cpu} if offload_param else {}),
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1_000_000_000,
        "reduce_bucket_size": 1_000_000,
    }
