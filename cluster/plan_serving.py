"""How a model is served on given hardware."""

from dataclasses import dataclass
from typing import Any, Literal

from cluster.hardware import Hardware
from cluster.memory import MemoryTable
from cluster.model_card import ModelCard, Precision
from cluster.presets import Decision

Engine = Literal["vllm", "transformers"]
DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan:
    """Every number that a replica of one model needs."""

    card: ModelCard
    hardware: Hardware
    engine: Engine
    precision: Precision
    compute_dtype: DType
    """torch's name of the dtype of activations, KV cache and unquantized weights."""
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    """Tokens of all sequences in one forward pass (vLLM's `max_num_batched_tokens`)."""
    kv_cache_tokens: int
    """Tokens that the planned KV cache holds, over all sequences of a replica."""
    tensor_parallel_size: int
    num_gpus: float
    """GPUs of one replica; a fraction when several replicas share one; 0 on a CPU."""
    replicas_per_node: int
    gpu_memory_utilization: float
    max_lora_rank: int
    max_loras: int
    memory: MemoryTable
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON types."""
        raise NotImplementedError


def plan_serving(
    card: ModelCard,
    hardware: Hardware,
    *,
    precision: Precision | None = None,
    engine: Engine | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    num_adapters: int | None = None,
    max_lora_rank: int | None = None,
) -> ServingPlan:
    """Return how `card` is served on `hardware`.

    Raises:
        DoesNotFit: nothing within the given wishes fits; the text holds the sum and the nearest options.
    """
    raise NotImplementedError
