"""One way to train a model: what its memory depends on."""

from dataclasses import dataclass

from cluster.activations import cpu_pass_tokens
from cluster.model_card import ModelCard, Precision
from cluster.presets import DType, LoraPreset, Method, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the state of a run is spread over workers and RAM (ZeRO, arXiv:1910.02054; offload, arXiv:2101.06840)."""

    strategy: Strategy = "ddp"
    zero_stage: int = 0
    """0 = none: with "ddp", every worker holds everything."""
    offload_optimizer: bool = False
    offload_gradients: bool = False
    offload_param: bool = False

    @property
    def has_offload(self) -> bool:
        """Return whether something lies in the RAM of the node."""
        return self.offload_optimizer or self.offload_gradients or self.offload_param

    @property
    def is_sharding_weights(self) -> bool:
        """Return whether each worker holds a part of the weights, and fetches the rest when it is needed."""
        return self.zero_stage == 3 or self.strategy == "fsdp"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLoad:
    """One way to train a model: everything its memory depends on."""

    card: ModelCard
    method: Method
    precision: Precision
    compute_dtype: DType
    lora: LoraPreset | None
    on_cpu: bool
    num_workers: int
    micro_batch_size: int
    max_length: int
    gradient_checkpointing: bool
    layout: Layout

    @property
    def pass_tokens(self) -> int:
        """Return the tokens that a worker takes at once: on a CPU, a micro-batch is cut into passes.

        Not under ZeRO and FSDP, where a pass is an exchange.
        """
        if self.on_cpu and self.layout.strategy in ("ddp", "dp"):
            return cpu_pass_tokens(micro_batch_size=self.micro_batch_size, max_length=self.max_length)
        return self.micro_batch_size * self.max_length

    @property
    def has_head_loss(self) -> bool:
        """Return whether the head is frozen and whole, so that its logits are forgotten (`train_jobs.head_loss`)."""
        return self.lora is not None and self.layout.zero_stage != 3
