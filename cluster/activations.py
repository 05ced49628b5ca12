"""What a pass keeps for its backward pass: the tensors of a layer, added up.

A frozen linear keeps no input, an adapter keeps its own; what several layers keep of one tensor is counted once.
"""

from dataclasses import dataclass

from cluster.memory import VALUE_BYTES
from cluster.model_card import Linear, ModelCard, Precision
from cluster.presets import DType, LoraPreset

CPU_PASS_TOKENS = 384
"""Tokens of one adapter that go through a CPU at once: enough for fast products with the weights."""
PASS_TOKENS = 1024
"""Tokens of several adapters that go through together: enough for fast products, and what backward needs is kept for
one pass at a time."""
HEAD_ROWS = 128
"""Labelled positions that a frozen head takes at a time: enough for a fast product with it, few against a batch."""
WORK_BYTES = 16
"""Of the widest tensor's values, while a layer's backward pass runs: that tensor anew, its gradient, the gradients of
what it was made of, float32 all of them. Most widely counted with dropout: 4 bytes x 4."""


def num_cpu_passes(num_tokens: int, *, num_samples: int) -> int:
    """Return in how many passes a CPU takes the samples of a micro-batch, to keep less for backward; none is cut."""
    return max(1, min(num_samples, -(-num_tokens // CPU_PASS_TOKENS)))


def cpu_pass_tokens(*, micro_batch_size: int, max_length: int) -> int:
    """Return the tokens of the largest of those passes.

    Of a micro-batch of the longest samples, or of one whose shorter samples just fit into one pass.
    """
    num_tokens = micro_batch_size * max_length
    num_samples = -(-micro_batch_size // num_cpu_passes(num_tokens, num_samples=micro_batch_size))
    return max(num_samples * max_length, min(num_tokens, CPU_PASS_TOKENS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward pass in training, and what decides how much of it is kept."""

    card: ModelCard
    precision: Precision
    compute_dtype: DType
    lora: LoraPreset | None
    """None for full fine-tuning."""
    num_tokens: int
    has_deepspeed: bool
    """Under it layers stay transformers' own (`train_jobs.pack.build_pack`)."""
    gradient_checkpointing: bool

    @property
    def value_bytes(self) -> int:
        """Return the bytes of an activation."""
        return VALUE_BYTES[self.compute_dtype]

    @property
    def has_lean_norms(self) -> bool:
        """Return whether norms keep their output alone (`cluster.models.lean_layers`)."""
        is_lean = self.lora is not None and self.value_bytes == 4 and not self.has_deepspeed
        return is_lean and self.card.layout.vectors_per_norm == 1

    @property
    def has_lean_mlp(self) -> bool:
        """Return whether MLPs compute the product of gate and up again (`BankedLinear.forward_gated`)."""
        is_plain = self.precision == "fp32" and not self.has_deepspeed
        return self.lora is not None and is_plain and "down_proj" in self.lora.target_modules

    def is_trained(self, *linears: str) -> bool:
        """Return whether one of `linears` learns or carries an adapter, and so keeps what it is given.

        bitsandbytes' 8-bit layers always do; under DeepSpeed they stay its own (`cluster.models.frozen_product`).
        """
        keeps_anyway = self.precision == "int8" and self.has_deepspeed
        return self.lora is None or keeps_anyway or any(x in self.lora.target_modules for x in linears)


def activation_bytes(one: Pass) -> int:
    """Return what a pass holds at its most, in the midst of its backward pass: what all layers keep, and one's work.

    With checkpointing each layer keeps its input alone (hidden x bytes, arXiv:1604.06174), and one layer at a time is
    computed again in full. Behind the layers, the labelled positions: normed, chosen, and their gradient.
    """
    card = one.card
    inputs = one.value_bytes * card.hidden_size
    layers = layer_bytes(one) * card.num_hidden_layers
    if one.gradient_checkpointing:
        layers = inputs * card.num_hidden_layers + layer_bytes(one)
    work = WORK_BYTES * card.intermediate_size * max(1, card.num_experts_per_tok)
    return (layers + 3 * inputs + work) * one.num_tokens


def layer_bytes(one: Pass) -> int:
    """Return what one token leaves for backward in one layer; a test counts it with hooks on each architecture."""
    norms = 2 * _norm_bytes(one)
    if one.lora is not None and not one.has_lean_norms and not one.is_trained("gate_proj", "up_proj", "c_fc"):
        norms -= one.value_bytes * one.card.hidden_size  # the second one's output, which nobody needs
    return norms + _attention_bytes(one) + _mlp_bytes(one) + _adapter_bytes(one)


def _norm_bytes(one: Pass) -> int:
    """Return a norm's input and output, and a float32 scale.

    A lean RMSNorm keeps no input. transformers' keeps it in float32, and where its weight learns, the input over its
    root mean square too. LayerNorm keeps a mean beside the scale.
    """
    hidden, value = one.card.hidden_size, one.value_bytes
    if one.card.layout.vectors_per_norm == 2:
        return 2 * value * hidden + 8
    if one.has_lean_norms:
        return value * hidden + 4
    return (4 + value + (value if one.lora is None else 0)) * hidden + 4


def _attention_bytes(one: Pass) -> int:
    """Return queries, keys and values, the result of each sample and those of all end to end, and a float32 per head.

    Qwen3's norms of queries and keys keep one more of each: lean ones their output, others their input in float32.
    """
    card, value = one.card, one.value_bytes
    queries, keys = card.num_attention_heads * card.head_dim, card.num_key_value_heads * card.head_dim
    kept = value * (3 * queries + 2 * keys) + 4 * card.num_attention_heads
    if card.layout.has_qk_norm:
        kept += (4 + (value if one.lora is None else 0)) * (queries + keys)
        kept += 4 * (card.num_attention_heads + card.num_key_value_heads)
    return kept


def _mlp_bytes(one: Pass) -> int:
    """Return the tensors of the MLP's width.

    Gated: gate, its activation, up and their product, which only what is trained behind it keeps; lean ones: gate and
    up. GPT-2's: the input of its GELU, four tensors between and the result. Experts: as a gated MLP, for each token and
    chosen expert, with six indices; what they give is kept for the router's weight, what they are given where they
    learn; the router keeps its scores twice and a mask as often.
    """
    card, value = one.card, one.value_bytes
    is_kept = one.is_trained("down_proj", "c_proj")
    match card.layout.mlp:
        case "gated":
            return value * card.intermediate_size * (2 if one.has_lean_mlp else 4 if is_kept else 3)
        case "plain":
            return value * card.intermediate_size * (5 if is_kept else 4)
        case "experts":
            width = (3 * card.intermediate_size + card.hidden_size) if one.lora else _trained_expert_width(card)
            router = 2 * (value + 1) * card.num_local_experts
            return (value * width + 48) * card.num_experts_per_tok + router
    raise AssertionError(card.layout.mlp)


def _trained_expert_width(card: ModelCard) -> int:
    return 4 * card.intermediate_size + 2 * card.hidden_size


def _adapter_bytes(one: Pass) -> int:
    """Return what lies between A and B of each adapter, in float32, and a byte for each input that dropout may take."""
    if one.lora is None:
        return 0
    layers = one.card.num_hidden_layers
    adapted = [x for x in one.card.linears() if _name(x) in one.lora.target_modules]
    masks = sum(x.in_features * x.count for x in adapted) // layers if one.lora.lora_dropout else 0
    return 4 * one.lora.r * sum(x.count for x in adapted) // layers + masks


def _name(linear: Linear) -> str:
    return linear.name.rpartition(".")[2]
