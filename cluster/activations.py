"""What a forward pass keeps for backward."""

from dataclasses import dataclass

from cluster.memory import VALUE_BYTES
from cluster.model_card import ModelCard
from cluster.presets import DType, Method

CPU_PASS_TOKENS = 512
"""Tokens of one adapter that go through a CPU at once: enough for fast products with the weights."""


def num_cpu_passes(num_tokens: int, *, num_samples: int) -> int:
    """Return in how many passes a CPU takes the samples of a micro-batch, to keep less for backward; none is cut."""
    return max(1, min(num_samples, -(-num_tokens // CPU_PASS_TOKENS)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRow:
    """Bytes kept for backward by one token in one layer: per unit of hidden, intermediate and key/value width."""

    per_hidden: float
    per_intermediate: float
    per_key_value: float


ACTIVATIONS: dict[tuple[str, str, int], ActivationRow] = {
    ("gated", "full", 4): ActivationRow(per_hidden=32.2, per_intermediate=16, per_key_value=8),
    ("gated", "full", 2): ActivationRow(per_hidden=20.2, per_intermediate=8, per_key_value=4),
    ("gated", "lora", 4): ActivationRow(per_hidden=28.7, per_intermediate=16, per_key_value=8),
    ("gated", "lora", 2): ActivationRow(per_hidden=36.6, per_intermediate=10, per_key_value=4),
    ("gated", "lora+dropout", 4): ActivationRow(per_hidden=64.7, per_intermediate=20, per_key_value=8),
    ("gated", "lora+dropout", 2): ActivationRow(per_hidden=60.6, per_intermediate=14, per_key_value=4),
    ("plain", "full", 4): ActivationRow(per_hidden=40.1, per_intermediate=20, per_key_value=0),
    ("plain", "full", 2): ActivationRow(per_hidden=26.1, per_intermediate=10, per_key_value=0),
    ("plain", "lora", 4): ActivationRow(per_hidden=40.4, per_intermediate=20, per_key_value=0),
    ("plain", "lora", 2): ActivationRow(per_hidden=32.3, per_intermediate=12, per_key_value=0),
    ("plain", "lora+dropout", 4): ActivationRow(per_hidden=52.4, per_intermediate=24, per_key_value=0),
    ("plain", "lora+dropout", 2): ActivationRow(per_hidden=44.3, per_intermediate=16, per_key_value=0),
}
"""(kind of MLP, what is trained, bytes of a value) -> counted with `torch.autograd.graph.saved_tensors_hooks` on two
and four layers of transformers 5.19 with PEFT 0.21 and sdpa attention; a test counts again. It refines Korthikanti's 34
bytes x hidden (arXiv:2205.05198): a frozen linear keeps no input, an adapter keeps an fp32 copy of it, its dropout one
more and a mask. Experts are taken as a gated MLP that runs `num_experts_per_tok` times."""
ATTENTION_DROPOUT_BYTES = 12
"""Per head, token and earlier token, where a model trains with dropout on its attention (GPT-2): the probabilities,
their mask and the dropped ones, which fused attention otherwise never stores. Counted the same way."""


def activation_bytes(
    card: ModelCard,
    *,
    method: Method,
    lora_dropout: float,
    compute_dtype: DType,
    micro_batch_size: int,
    max_length: int,
    gradient_checkpointing: bool,
) -> int:
    """Return what the forward pass keeps for backward, over all layers.

    With checkpointing each layer keeps its input alone (hidden x bytes, arXiv:1604.06174), and one layer at a time is
    computed again in full.
    """
    value_bytes = VALUE_BYTES[compute_dtype]
    trained = "full" if method == "full" else "lora+dropout" if lora_dropout else "lora"
    row = ACTIVATIONS["plain" if card.layout.mlp == "plain" else "gated", trained, value_bytes]
    per_token = (
        row.per_hidden * card.hidden_size
        + row.per_intermediate * card.intermediate_size * max(1, card.num_experts_per_tok)
        + row.per_key_value * card.num_key_value_heads * card.head_dim
    )
    if card.layout.has_attention_dropout:
        per_token += ATTENTION_DROPOUT_BYTES * card.num_attention_heads * max_length
    num_tokens = micro_batch_size * max_length
    if not gradient_checkpointing:
        return int(per_token * num_tokens * card.num_hidden_layers)
    return int(per_token * num_tokens) + card.hidden_size * value_bytes * num_tokens * card.num_hidden_layers
