"""How many bytes a model needs: pure arithmetic, formula and source on each function."""

from dataclasses import dataclass

from cluster.errors import UserError
from cluster.model_card import PREQUANTIZED, ModelCard, Precision
from cluster.presets import DType

GIB = 2**30
VALUE_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of an unquantized weight."""
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256
"""Weights that share one absmax, and absmaxes that share one fp32 scale under double quantization (bitsandbytes)."""
VLLM_BLOCK_TOKENS = 16
TRANSFORMERS_PAGE_TOKENS = 256
"""Tokens of one block of the KV cache: vLLM's `DEFAULT_BLOCK_SIZE`, transformers' `page_size`."""
PROCESS_BYTES = 768 * 2**20
"""What a process takes before the first tensor, and what lies idle between tensors. Measured on a CPU: 697 MiB resident
after importing torch, transformers, PEFT, Ray and Serve LLM; 695 MiB in a Ray Train worker that has run a base once,
beyond its weights. On a GPU, assumed the same: CUDA context, cuBLAS workspace, NCCL buffers."""
VLLM_CPU_PROCESS_BYTES = 2 * 2**30
"""The same for vLLM on a CPU, which is three processes: replica, engine and worker hold 588, 513 and 738 MiB beside
weights and cache (proportional set sizes, measured with vllm-cpu 0.29.0), and Ray's part comes on top."""
LORA_STATE_BYTES = 16
"""A trained fp32 parameter: value, gradient, two Adam moments, 4 bytes each (arXiv:1412.6980)."""
TRAINING_LOGIT_COPIES = 3
"""Logits, their log-softmax and their gradient live at once in cross entropy."""
SERVING_LOGIT_COPIES = 2
"""Logits and the probabilities that are sampled from."""


class DoesNotFit(UserError, ValueError):
    """The planned run needs more memory than there is; the text holds the sum and what would fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryItem:
    """One part of the memory of a device."""

    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTable:
    """What one device (one GPU, or the RAM of the node) must hold, against what it has for it."""

    device: str
    items: tuple[MemoryItem, ...]
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the sum of the items."""
        return sum(item.num_bytes for item in self.items)

    @property
    def fits(self) -> bool:
        """Return whether the items fit into what is available."""
        return self.total_bytes <= self.available_bytes

    def num_bytes(self, name: str) -> int:
        """Return the bytes of the item called `name`, 0 if there is none."""
        return sum(item.num_bytes for item in self.items if item.name == name)

    def rounded(self, per_gib: int) -> list[int]:
        """Return the items in 1/`per_gib` GiB, rounded such that they add up to the rounded sum.

        Where rounding each to the nearest leaves a difference, it goes to the items that rounding changed most.
        """
        exact = [item.num_bytes * per_gib / GIB for item in self.items]
        parts = [round(value) for value in exact]
        missing = round(self.total_bytes * per_gib / GIB) - sum(parts)
        step = 1 if missing > 0 else -1
        by_error = sorted(range(len(parts)), key=lambda index: step * (parts[index] - exact[index]))
        for index in by_error[: abs(missing)]:
            parts[index] += step
        return parts

    def as_sum(self) -> str:
        """Return the items as a sum in GiB, for a sentence."""
        tenths = self.rounded(10)
        parts = ", ".join(f"{item.name} {n / 10:.1f}" for item, n in zip(self.items, tenths, strict=True) if n)
        return f"{sum(tenths) / 10:.1f} GiB ({parts})"


def weights_bytes(card: ModelCard, precision: Precision, compute_dtype: DType = "bfloat16") -> int:
    """Return the bytes of all weights: the linears at `precision`, everything else in `compute_dtype`.

    Embeddings, norms, biases, `lm_head`, routers and 3-D experts are never quantized. An unquantized model is held in
    its precision throughout.
    """
    if precision in WEIGHT_BYTES:
        return card.num_parameters() * WEIGHT_BYTES[precision]
    rest = (card.num_parameters() - card.num_linear_parameters()) * VALUE_BYTES[compute_dtype]
    return rest + _quantized_bytes(card, precision)


def _quantized_bytes(card: ModelCard, precision: Precision) -> int:
    """Return the bytes of the quantized linears.

    nf4: half a byte a weight, one byte for the absmax of 64, 4 bytes for the scale of 256 of those: 0.5159 bytes
    (double quantization, QLoRA, arXiv:2305.14314). int8: one byte, and 4 for each output row (LLM.int8,
    arXiv:2208.07339). gptq and awq: bits / 8, and for each group an fp16 scale and a zero point (arXiv:2210.17323,
    arXiv:2306.00978). compressed-tensors: bits / 8, and a 4-byte scale for each group.
    """
    weights = card.num_linear_parameters()
    if precision == "nf4":
        return weights // 2 + weights // NF4_BLOCK + 4 * weights // (NF4_BLOCK * NF4_NESTED_BLOCK)
    num_rows = sum(linear.out_features * linear.count for linear in card.linears())
    if precision == "int8":
        return weights + 4 * num_rows
    bits = card.checkpoint_bits or 4
    num_groups = weights // card.checkpoint_group_size if card.checkpoint_group_size else num_rows
    return weights * bits // 8 + num_groups * (32 if precision == "compressed-tensors" else 16 + bits) // 8


def kv_cache_bytes(card: ModelCard, *, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Return the memory for the keys and values of `num_tokens` cached tokens.

    2 (K and V) x layers x kv heads x head_dim x tokens x bytes. Tokens are summed over all sequences in flight: the
    cache is allocated by block, not by sequence (arXiv:2309.06180).
    """
    return 2 * card.num_hidden_layers * card.num_key_value_heads * card.head_dim * num_tokens * bytes_per_value


def whole_blocks(num_tokens: int, block_tokens: int) -> int:
    """Return `num_tokens` rounded up to whole blocks of the cache: what one sequence of that length occupies."""
    return -(-num_tokens // block_tokens) * block_tokens


def num_lora_parameters(card: ModelCard, *, r: int, target_modules: tuple[str, ...] | None = None) -> int:
    """Return the sum of r x (d_in + d_out) over the adapted linears (LoRA, arXiv:2106.09685)."""
    targets = card.target_modules if target_modules is None else target_modules
    return sum(
        r * (linear.in_features + linear.out_features) * linear.count
        for linear in card.linears()
        if linear.name.rpartition(".")[2] in targets
    )


def logits_bytes(card: ModelCard, *, num_tokens: int, copies: int) -> int:
    """Return tokens x vocabulary x 4 bytes x copies: the head computes in fp32."""
    return num_tokens * card.vocab_size * 4 * copies


def dequantized_linear_bytes(card: ModelCard, precision: Precision, compute_dtype: DType) -> int:
    """Return the largest linear in `compute_dtype`: bitsandbytes unpacks one whole linear at a time to multiply it."""
    if precision in WEIGHT_BYTES or precision in PREQUANTIZED:
        return 0
    return max(linear.in_features * linear.out_features for linear in card.linears()) * VALUE_BYTES[compute_dtype]


def forward_bytes(card: ModelCard, *, num_tokens: int, compute_dtype: DType) -> int:
    """Return the widest moment of a forward pass without gradients over `num_tokens` tokens of a batch.

    Four tensors of hidden width (residual, normed input, block output, sum) and three of the MLP's width (gate, up,
    their product); experts run on `num_experts_per_tok` copies of each token.
    """
    width = 4 * card.hidden_size + 3 * card.intermediate_size * max(1, card.num_experts_per_tok)
    return num_tokens * width * VALUE_BYTES[compute_dtype]


def gathered_cache_bytes(card: ModelCard, *, batch_tokens: int, cached_tokens: int, compute_dtype: DType) -> int:
    """Return what sdpa attention over a paged cache needs beside the cache, for one layer.

    K and V of all cached tokens read back and repeated for every query head, V once more before it is repeated, and a
    mask [batch, cached + batch] (transformers 5.19, `continuous_batching/cache.py`, `PagedAttentionMemoryHandler`).
    """
    heads = 2 * card.num_attention_heads + card.num_key_value_heads
    all_tokens = cached_tokens + batch_tokens
    return all_tokens * (heads * card.head_dim + batch_tokens) * VALUE_BYTES[compute_dtype]
