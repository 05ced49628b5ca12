"""How a model is served on given hardware."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from cluster import traps
from cluster.hardware import Hardware
from cluster.memory import DoesNotFit, MemoryTable, whole_blocks
from cluster.model_card import ModelCard, Precision
from cluster.plan_engine import Engine, choose_engine
from cluster.plan_options import lighter_precisions, machine_groups
from cluster.plan_precision import choose_compute_dtype, choose_precision, half_precision
from cluster.plan_record import Attempt, Log, memory_json, what_fits
from cluster.presets import Decision, DType
from cluster.serving_arrangement import (
    GPU_MEMORY_UTILIZATION,
    MIN_CONTEXT,
    VLLM_LORA_RANKS,
    ServingWishes,
    arrange,
    available_bytes,
    candidates,
    explain,
    first_load,
    num_adapters_wanted,
)
from cluster.serving_memory import ServingLoad, block_tokens, serving_table

GPU_SHARES = 8
"""A replica that needs half a GPU or less takes eighths of it."""


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
    """Tokens of one sequence, prompt and answer."""
    max_num_seqs: int
    max_batch_tokens: int
    """Tokens of all sequences in one forward pass (vLLM's `max_num_batched_tokens`)."""
    kv_cache_tokens: int
    """Tokens that the planned KV cache holds, over all sequences of a replica; whole blocks."""
    tensor_parallel_size: int
    num_gpus: float
    """GPUs of one replica; a fraction when several replicas share one; 0 on a CPU."""
    replicas_per_node: int
    gpu_memory_utilization: float
    """Of one GPU, by one replica; 0 on a CPU."""
    max_lora_rank: int
    max_loras: int
    """Adapters in memory at once; 0 plans none."""
    memory: MemoryTable
    """Of one GPU, or of the RAM."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON types."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        record["memory"] |= memory_json(self.memory)
        return record


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
        ImpossibleCombination: wishes that exclude each other, whatever the memory.
    """
    wishes = ServingWishes(
        precision=precision,
        engine=engine,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_adapters=num_adapters,
        max_lora_rank=max_lora_rank,
    )
    _check(card, wishes)
    try:
        return _plan(card, hardware, wishes)
    except DoesNotFit as error:
        raise DoesNotFit(f"{error} {what_fits(_options(card, hardware, wishes))}") from None


def _options(card: ModelCard, hardware: Hardware, wishes: ServingWishes) -> Iterator[Iterable[Attempt]]:
    """Yield groups of changes to try, nearest first: lighter weights, a shorter context, other machines."""
    lighter = lighter_precisions(card, hardware, wishes.precision)
    yield [
        (f"with precision '{p}'", partial(_plan, card, hardware, replace(wishes, precision=p, engine=None)))
        for p in lighter
    ]
    if wishes.max_model_len:
        lengths = [wishes.max_model_len // 2**n for n in range(1, 8) if wishes.max_model_len // 2**n >= MIN_CONTEXT]
        yield [
            (f"with max_model_len {n}", partial(_plan, card, hardware, replace(wishes, max_model_len=n)))
            for n in lengths
        ]
    yield from machine_groups(card, hardware, wishes, _plan)


def _check(card: ModelCard, wishes: ServingWishes) -> None:
    low = {"max_model_len": 1, "max_num_seqs": 1, "num_adapters": 0, "max_lora_rank": 1}
    wrong = [f"{n}={v} (at least {m})" for n, m in low.items() if (v := getattr(wishes, n)) is not None and v < m]
    if wishes.max_model_len is not None and wishes.max_model_len > card.max_position_embeddings:
        wrong.append(f"max_model_len={wishes.max_model_len} (at most {card.max_position_embeddings}, the model's own)")
    if wishes.max_lora_rank is not None and wishes.max_lora_rank > VLLM_LORA_RANKS[-1]:
        wrong.append(f"max_lora_rank={wishes.max_lora_rank} (at most {VLLM_LORA_RANKS[-1]})")
    if wrong:
        raise traps.ImpossibleCombination(f"{card.name} cannot be served with {', '.join(wrong)}.")


def _plan(card: ModelCard, hardware: Hardware, wishes: ServingWishes) -> ServingPlan:
    log = Log()
    precision = _precision(card, hardware, log, wishes)
    dtype = choose_compute_dtype(card, hardware, log, precision)
    adapters = num_adapters_wanted(card, wishes, on_cpu=hardware.gpu is None)
    engine = choose_engine(card, hardware, precision, log, wanted=wishes.engine, num_adapters=adapters)
    load = first_load(card, hardware, wishes, engine, precision, dtype)
    arranged = arrange(load, hardware, wishes)
    if arranged is None:
        raise _does_not_fit(load, hardware, wishes)
    load, context = arranged
    explain(load, context, hardware, wishes, log)
    return _finish(load, context, hardware, log)


def _precision(card: ModelCard, hardware: Hardware, log: Log, wishes: ServingWishes) -> Precision:
    fp32 = first_load(card, hardware, wishes, "transformers", "fp32", "float32")
    fits_fp32 = hardware.gpu is None and arrange(fp32, hardware, wishes) is not None
    trial = Log()
    precision = choose_precision(card, hardware, trial, wanted=wishes.precision, fits_fp32=fits_fp32)
    if precision == "int8" and wishes.engine == "vllm" and wishes.precision is None and hardware.gpu is not None:
        half = half_precision(hardware)
        whole = first_load(card, hardware, wishes, "vllm", half, "bfloat16" if half == "bf16" else "float16")
        precision = "nf4" if arrange(whole, hardware, wishes) is None else half
        log.decide("precision", precision, "user", "engine 'vllm' was asked for, which has no 8-bit in flight")
        return precision
    log.decisions += trial.decisions
    log.warn(*trial.warnings)
    return precision


def _finish(load: ServingLoad, context: int, hardware: Hardware, log: Log) -> ServingPlan:
    """Return the plan: give the replica its share of the node."""
    available = available_bytes(hardware)
    device = "RAM"
    num_gpus, utilization, replicas = 0.0, 0.0, 1
    if hardware.gpu is not None:
        device = f"each {hardware.gpu.name}"
        total = serving_table(load, device=device, available_bytes=available).total_bytes
        shares = -(-total * GPU_SHARES // available)
        if load.tensor_parallel_size == 1 and shares <= GPU_SHARES // 2:
            num_gpus, replicas = shares / GPU_SHARES, GPU_SHARES // shares * hardware.num_gpus
            available = available * shares // GPU_SHARES
            log.decide("num_gpus", num_gpus, "memory", f"{shares} eighths of a GPU are enough for a replica")
        else:
            num_gpus, replicas = float(load.tensor_parallel_size), hardware.num_gpus // load.tensor_parallel_size
            log.decide("num_gpus", num_gpus, "memory", "a replica needs more than half of a GPU")
        utilization = GPU_MEMORY_UTILIZATION * min(num_gpus, 1.0)
        log.decide("gpu_memory_utilization", f"{utilization:.3f}", "memory", "vLLM's 0.92 times the share of the GPU")
        log.decide("replicas_per_node", replicas, "hardware", f"{num_gpus:g} of {hardware.num_gpus} GPU for each")
    else:
        log.decide("num_gpus", 0, "hardware", "there is no GPU")
        log.decide("replicas_per_node", 1, "hardware", "one replica uses every core; a second would share them")
    return ServingPlan(
        card=load.card,
        hardware=hardware,
        engine=load.engine,
        precision=load.precision,
        compute_dtype=load.compute_dtype,
        max_model_len=context,
        max_num_seqs=load.max_num_seqs,
        max_batch_tokens=load.max_batch_tokens,
        kv_cache_tokens=load.kv_cache_tokens,
        tensor_parallel_size=load.tensor_parallel_size,
        num_gpus=num_gpus,
        replicas_per_node=replicas,
        gpu_memory_utilization=round(utilization, 4),
        max_lora_rank=load.max_lora_rank,
        max_loras=load.max_loras,
        memory=serving_table(load, device=device, available_bytes=available),
        decisions=tuple(log.decisions),
        warnings=tuple(log.warnings),
    )


def _does_not_fit(load: ServingLoad, hardware: Hardware, wishes: ServingWishes) -> DoesNotFit:
    """Return the error for the narrowest candidate: what even that one needs."""
    *_, (narrowest, context, _) = candidates(load, hardware, wishes)
    tokens = whole_blocks(context, block_tokens(load.engine))
    device = "RAM" if hardware.gpu is None else hardware.gpu.name
    table = serving_table(
        replace(narrowest, kv_cache_tokens=tokens), device=device, available_bytes=available_bytes(hardware)
    )
    split = narrowest.tensor_parallel_size
    where = f"on each of {split} GPUs" if split > 1 else "on one device"
    text = f"{load.card.name} at {load.precision} on engine '{load.engine}' needs {table.as_sum()} {where} for one "
    text += f"sequence of {context} tokens; {hardware} leaves {table.available_bytes / 2**30:.1f} GiB of {device}."
    if load.card.is_cpu_offload_required and hardware.gpu is not None:
        layer = 2 * load.card.num_linear_parameters() // load.card.num_hidden_layers
        text += f" CPUオフロード is no way out for serving: {traps.layers_on_cpu(layer, load.card.num_hidden_layers)}"
    return DoesNotFit(text)
