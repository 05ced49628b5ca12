"""What the driver sends to its workers: everything a run needs, checked and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.model_card import ModelCard, Precision
from cluster.models.adapter_spec import AdapterSpec
from cluster.presets import MAX_GRAD_NORM, WEIGHT_DECAY, SchedulerType, Strategy
from train_jobs.tokens import Sample

NO_ADAPTER = AdapterSpec(r=0, lora_alpha=0, target_modules=())
"""What full fine-tuning has in place of an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterJob:
    """One adapter to train: with the same values it learns the same alone and in a pack."""

    spec: AdapterSpec
    """`NO_ADAPTER` to train the base's own weights."""
    seed: int
    """Of the adapter's start, its order of samples and its dropout."""
    num_steps: int
    learning_rate: float
    lr_scheduler_type: SchedulerType
    num_warmup_steps: int
    weight_decay: float = WEIGHT_DECAY
    max_grad_norm: float = MAX_GRAD_NORM
    neftune_noise_alpha: float = 0.0
    """Noise on the embeddings (arXiv:2310.05914); 0 is none."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A held-out question, and what makes an answer to it right."""

    prompt_ids: tuple[int, ...]
    answer_contains: str | None
    """What a right answer contains; None: it has to be the reference."""
    max_new_tokens: int
    text: str = ""
    """What the user asked, for people."""
    reference: str = ""
    """The answer in the data."""

    @property
    def expected(self) -> str:
        """Return what a right answer contains or is."""
        return self.reference if self.answer_contains is None else self.answer_contains

    def is_right(self, answer: str) -> bool:
        """Return whether `answer` is right; white space around it does not count."""
        if self.answer_contains is None:
            return answer.strip() == self.reference.strip()
        return self.answer_contains in answer


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """A pack of adapters on one base; an ordinary run is a pack of one."""

    card: ModelCard
    precision: Precision
    compute_dtype: Literal["float32", "float16", "bfloat16"]
    adapters: tuple[AdapterJob, ...]
    samples: Sequence[Sample]
    """A `TokenStore` is sent as its place, tokens and all only to machines that do not see it."""
    held_out: Sequence[Sample]
    questions: tuple[Question, ...]
    batch_size: int
    """Samples per adapter and optimizer step, over all workers and micro-batches."""
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    strategy: Strategy = "ddp"
    """How workers share a step."""
    deepspeed_zero: dict[str, object] | None
    """DeepSpeed's `zero_optimization` section, with strategy "deepspeed" alone."""
    checkpoint_steps: int
    """Optimizer steps between two checkpoints."""
    num_threads: int
    """Of each worker, for its matrix products."""
    eval_steps: int | None = None
    """Optimizer steps between two looks at the held-out part, after which the best weights are kept; None: no look."""
    early_stopping_patience: int | None = None
    """After how many looks in a row without a lower loss the run ends; None: never."""
    stop_step: int | None = None
    """Optimizer steps after which the run ends before its schedule does; what it leaves is enough to go on later.
    None is the schedule's end."""
