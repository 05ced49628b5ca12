"""What a replica tries to hold, from all that is wished for down to one short sequence, and what of it fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster import traps
from cluster.hardware import Hardware
from cluster.memory import whole_blocks
from cluster.model_card import PREQUANTIZED, ModelCard, Precision
from cluster.plan_engine import Engine, lora_obstacle, tensor_parallel_sizes
from cluster.plan_record import Log
from cluster.presets import DType, lora_preset
from cluster.serving_memory import ServingLoad, block_tokens, cache_capacity

DEFAULT_STREAMS = 16
FEW_STREAMS = 4
"""A plan of our own takes another GPU rather than serve fewer."""
DEFAULT_ADAPTERS = 8
GPU_CONTEXT, CPU_CONTEXT, MIN_CONTEXT = 4096, 2048, 512
GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 2048, 512
"""Tokens of one forward pass; more fill a GPU no better and cost activations (vLLM's own default is 2048)."""
GPU_MEMORY_UTILIZATION = 0.92
"""vLLM 0.29's default: the rest is for what a process cannot see, such as another's context and fragmentation."""
RAM_UTILIZATION = 0.8
"""The rest of the RAM is for the system, Ray's own processes and its object store."""
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` may be (vLLM 0.29, `config/lora.py`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingWishes:
    """What the caller fixed; None is left to the plan."""

    precision: Precision | None = None
    engine: Engine | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    num_adapters: int | None = None
    max_lora_rank: int | None = None


def num_adapters_wanted(card: ModelCard, wishes: ServingWishes, *, on_cpu: bool) -> int:
    """Return the adapters to hold at once: the wish, or ours; none where the engine can only be one that takes none."""
    if wishes.num_adapters is not None:
        return wishes.num_adapters
    is_vllm = wishes.engine == "vllm" or card.checkpoint_quantization in PREQUANTIZED
    return 0 if is_vllm and lora_obstacle(card, on_cpu=on_cpu) else DEFAULT_ADAPTERS


def max_lora_rank(rank: int) -> int:
    """Return the smallest `max_lora_rank` that an engine can be given for adapters of `rank`."""
    return min(r for r in VLLM_LORA_RANKS if r >= rank)


def first_load(
    card: ModelCard, hardware: Hardware, wishes: ServingWishes, engine: Engine, precision: Precision, dtype: DType
) -> ServingLoad:
    """Return what is tried first: all wishes, our defaults elsewhere, no cache yet."""
    streams = wishes.max_num_seqs or DEFAULT_STREAMS
    rank = wishes.max_lora_rank or lora_preset(card).r
    return ServingLoad(
        card=card,
        engine=engine,
        precision=precision,
        compute_dtype=dtype,
        tensor_parallel_size=1,
        max_num_seqs=streams,
        max_batch_tokens=max(streams, CPU_BATCH_TOKENS if hardware.gpu is None else GPU_BATCH_TOKENS),
        kv_cache_tokens=0,
        max_loras=num_adapters_wanted(card, wishes, on_cpu=hardware.gpu is None),
        max_lora_rank=max_lora_rank(rank),
        on_cpu=hardware.gpu is None,
    )


def available_bytes(hardware: Hardware) -> int:
    """Return what one replica may take of a GPU, or of the RAM where there is none."""
    if hardware.gpu is None:
        return int(hardware.ram_bytes * RAM_UTILIZATION)
    return int(hardware.gpu.memory_bytes * GPU_MEMORY_UTILIZATION)


def _contexts(load: ServingLoad, hardware: Hardware, wishes: ServingWishes) -> list[int]:
    if wishes.max_model_len is not None:
        return [wishes.max_model_len]
    longest = load.card.max_position_embeddings
    first = min(longest, CPU_CONTEXT if hardware.gpu is None else GPU_CONTEXT)
    halves = [first // 2**n for n in range(4)]
    return [length for length in halves if length >= min(MIN_CONTEXT, longest)]


def candidates(load: ServingLoad, hardware: Hardware, wishes: ServingWishes) -> Iterator[tuple[ServingLoad, int, int]]:
    """Yield what may be tried (load, context, streams that must fit): the wishes first, the narrowest last."""
    floors = (wishes.max_num_seqs, 1) if wishes.max_num_seqs else (FEW_STREAMS, 1)
    halves = {load.max_loras // 2**n for n in range(load.max_loras.bit_length() + 1)}
    adapters = [load.max_loras] if wishes.num_adapters is not None else sorted(halves, reverse=True)
    for context in _contexts(load, hardware, wishes):
        for floor in floors:
            for split in tensor_parallel_sizes(load.card, hardware, load.engine):
                for count in adapters:
                    yield replace(load, tensor_parallel_size=split, max_loras=count), context, floor


def arrange(load: ServingLoad, hardware: Hardware, wishes: ServingWishes) -> tuple[ServingLoad, int] | None:
    """Return the first candidate that fits, with its cache and streams, and its context; None if none fits."""
    available = available_bytes(hardware)
    for candidate, context, floor in candidates(load, hardware, wishes):
        sequence = whole_blocks(context, block_tokens(load.engine))
        capacity = cache_capacity(candidate, available_bytes=available)
        if capacity >= floor * sequence:
            tokens = min(capacity, load.max_num_seqs * sequence)
            streams = wishes.max_num_seqs or min(load.max_num_seqs, tokens // sequence)
            return replace(candidate, kv_cache_tokens=tokens, max_num_seqs=streams), context
    return None


def explain(load: ServingLoad, context: int, hardware: Hardware, wishes: ServingWishes, log: Log) -> None:
    """Write to `log` why the arrangement is what it is."""
    card = load.card
    sequence = whole_blocks(context, block_tokens(load.engine))
    at_once = load.kv_cache_tokens // sequence
    first = _contexts(load, hardware, wishes)[0]
    if wishes.max_model_len:
        log.decide("max_model_len", context, "user", "asked for")
    elif context < first:
        log.decide("max_model_len", context, "memory", f"{first} tokens of cache do not fit even once")
    else:
        log.decide("max_model_len", context, "default", f"the model can take {card.max_position_embeddings}")
    if wishes.max_num_seqs:
        log.decide("max_num_seqs", load.max_num_seqs, "user", "asked for")
    elif at_once < DEFAULT_STREAMS:
        log.decide("max_num_seqs", load.max_num_seqs, "memory", "as many full-length sequences as the cache holds")
    else:
        log.decide("max_num_seqs", load.max_num_seqs, "default", "the cache holds all of them at full length")
    if at_once < load.max_num_seqs:
        log.warn(f"The cache holds {at_once} sequences of {context} tokens at once; more wait until one is finished.")
    _explain_adapters(load, wishes, log)
    _explain_split(load, log)
    log.warn(traps.no_chat_template(card))
    if card.is_cpu_offload_required and hardware.gpu is not None:
        log.warn("The specification's CPUオフロード: 必須 is not needed here: the quantized weights fit on the GPU.")


def _explain_adapters(load: ServingLoad, wishes: ServingWishes, log: Log) -> None:
    wanted = num_adapters_wanted(load.card, wishes, on_cpu=load.on_cpu)
    if wishes.num_adapters is not None:
        log.decide("max_loras", load.max_loras, "user", "asked for")
    elif load.max_loras < wanted:
        log.decide("max_loras", load.max_loras, "memory", f"{wanted} adapters of rank {load.max_lora_rank} do not fit")
        log.warn(None if load.max_loras else "No adapter fits beside the model: this plan serves the base alone.")
    else:
        reason = "adapters in memory at once" if wanted else str(lora_obstacle(load.card, on_cpu=load.on_cpu))
        log.decide("max_loras", load.max_loras, "default", reason)
    if wishes.max_lora_rank is None:
        log.decide("max_lora_rank", load.max_lora_rank, "size rule", "the LoRA preset of the model's size")
    else:
        rounded = "" if wishes.max_lora_rank == load.max_lora_rank else ", raised to the next rank that vLLM allows"
        log.decide("max_lora_rank", load.max_lora_rank, "user", f"{wishes.max_lora_rank} asked for{rounded}")


def _explain_split(load: ServingLoad, log: Log) -> None:
    split = load.tensor_parallel_size
    if split > 1:
        heads = f"divides {load.card.num_attention_heads} heads and {load.card.num_key_value_heads} key/value heads"
        log.decide("tensor_parallel_size", split, "memory", f"the smallest split that fits and {heads}")
    else:
        log.decide("tensor_parallel_size", split, "memory", "one device is enough")
