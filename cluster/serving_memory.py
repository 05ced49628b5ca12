"""What a replica holds in memory, as a table that adds up."""

from dataclasses import dataclass, replace

from cluster.memory import (
    PROCESS_BYTES,
    SERVING_LOGIT_COPIES,
    TRANSFORMERS_PAGE_TOKENS,
    VALUE_BYTES,
    VLLM_BLOCK_TOKENS,
    VLLM_CPU_PROCESS_BYTES,
    MemoryItem,
    MemoryTable,
    dequantized_linear_bytes,
    forward_bytes,
    gathered_cache_bytes,
    kv_cache_bytes,
    logits_bytes,
    num_lora_parameters,
    weights_bytes,
)
from cluster.model_card import ModelCard, Precision
from cluster.plan_engine import Engine
from cluster.presets import DType


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLoad:
    """One way to serve a model: everything its memory depends on."""

    card: ModelCard
    engine: Engine
    precision: Precision
    compute_dtype: DType
    tensor_parallel_size: int
    max_num_seqs: int
    max_batch_tokens: int
    kv_cache_tokens: int
    max_loras: int
    max_lora_rank: int
    on_cpu: bool


def block_tokens(engine: Engine) -> int:
    """Return the tokens of one block of the engine's KV cache."""
    return VLLM_BLOCK_TOKENS if engine == "vllm" else TRANSFORMERS_PAGE_TOKENS


def serving_table(load: ServingLoad, *, device: str, available_bytes: int) -> MemoryTable:
    """Return the memory of one device: tensor parallelism splits everything but the process and the gathered logits."""
    card, dtype, split = load.card, load.compute_dtype, load.tensor_parallel_size
    value_bytes = VALUE_BYTES[dtype]
    tokens = load.kv_cache_tokens
    adapters = load.max_loras * num_lora_parameters(card, r=load.max_lora_rank) * value_bytes
    work = forward_bytes(card, num_tokens=load.max_batch_tokens, compute_dtype=dtype)
    work += dequantized_linear_bytes(card, load.precision, dtype)
    if load.engine == "transformers":
        work += gathered_cache_bytes(
            card, batch_tokens=load.max_batch_tokens, cached_tokens=tokens, compute_dtype=dtype
        )
    logits = logits_bytes(card, num_tokens=load.max_num_seqs, copies=SERVING_LOGIT_COPIES)
    cache = kv_cache_bytes(card, num_tokens=tokens, bytes_per_value=value_bytes)
    weights = weights_bytes(card, load.precision, dtype)
    over = f" / {split} GPUs" if split > 1 else ""
    head = packed_head_bytes(load)
    return MemoryTable(
        device=device,
        available_bytes=available_bytes,
        items=(
            MemoryItem(name="weights", num_bytes=-(-weights // split), formula=f"{load.precision}{over}"),
            *([MemoryItem(name="packed head", num_bytes=head, formula="vocabulary x hidden, fp32")] if head else []),
            MemoryItem(
                name="KV cache",
                num_bytes=-(-cache // split),
                formula=f"{tokens:,} tokens x {cache // max(tokens, 1) / 1024:.1f} KiB{over}",
            ),
            MemoryItem(
                name="adapters",
                num_bytes=-(-adapters // split),
                formula=f"{load.max_loras} of rank {load.max_lora_rank}, {dtype}{over}",
            ),
            MemoryItem(
                name="activations",
                num_bytes=-(-work // split),
                formula=f"{load.max_batch_tokens:,} tokens a pass{over}",
            ),
            MemoryItem(
                name="logits", num_bytes=logits, formula=f"{load.max_num_seqs} rows x vocabulary, fp32, 2 copies"
            ),
            MemoryItem(name="process", num_bytes=_process_bytes(load), formula="libraries, context, workspaces"),
        ),
    )


def packed_head_bytes(load: ServingLoad) -> int:
    """Return vocabulary x hidden x 4 bytes where the head shares the embedding's table and is held a second time.

    Our engine repacks float32 linear layers on a CPU. Others give up their rows; a tied table is also looked up by row.
    """
    is_copied = load.on_cpu and load.engine == "transformers" and load.card.tie_word_embeddings
    return load.card.vocab_size * load.card.hidden_size * 4 if is_copied and load.compute_dtype == "float32" else 0


def _process_bytes(load: ServingLoad) -> int:
    return VLLM_CPU_PROCESS_BYTES if load.engine == "vllm" and load.on_cpu else PROCESS_BYTES


def cache_capacity(load: ServingLoad, *, available_bytes: int) -> int:
    """Return the most tokens of KV cache, in whole blocks, that leave the table within `available_bytes`; 0 if none."""
    block = block_tokens(load.engine)

    def total(blocks: int) -> int:
        filled = replace(load, kv_cache_tokens=blocks * block)
        return serving_table(filled, device="", available_bytes=available_bytes).total_bytes

    left = available_bytes - total(0)
    # The table is linear in the tokens but for rounding up, which can cost a byte an item.
    blocks = max(0, left // (total(1) - total(0)))
    while blocks and total(blocks) > available_bytes:
        blocks -= 1
    return blocks * block
