"""What a run tries to hold, from the preset's batch down to one sample with everything offloaded, and what fits."""

from collections.abc import Iterator
from dataclasses import replace

from cluster import traps
from cluster.hardware import Hardware
from cluster.memory import MemoryTable
from cluster.model_card import ModelCard, Precision
from cluster.plan_batch import Batch, batches, wanted_batch_size
from cluster.plan_layout import layouts
from cluster.plan_record import Log
from cluster.presets import DType, LoraPreset, Method
from cluster.serving_arrangement import GPU_MEMORY_UTILIZATION, RAM_UTILIZATION
from cluster.training_load import Layout, TrainingLoad
from cluster.training_memory import device_table, host_table
from cluster.training_wishes import TrainingWishes

DEFAULT_LENGTH = 1024
"""Long enough for nearly all chat samples; activations and logits grow with it."""
MIN_LENGTH = 128


def _num_workers(hardware: Hardware, wishes: TrainingWishes) -> int:
    """Return one worker a GPU; on a CPU two, the fewest that train in parallel at all.

    Raises:
        ImpossibleCombination: more workers than GPUs, or than the one process of nn.DataParallel.
    """
    if wishes.strategy == "dp" and hardware.num_gpus <= 1:
        if wishes.num_workers not in (None, 1):
            raise traps.ImpossibleCombination(traps.DATA_PARALLEL_WORKERS)
        return 1
    if wishes.num_workers is None:
        return hardware.num_gpus if hardware.gpu is not None else min(2, hardware.num_cpus)
    if hardware.gpu is not None and wishes.num_workers > hardware.num_gpus:
        raise traps.ImpossibleCombination(
            f"num_workers={wishes.num_workers} on {hardware.num_gpus} x {hardware.gpu.name}: a worker needs a GPU of "
            f"its own; at most {hardware.num_gpus}."
        )
    return wishes.num_workers


def first_load(
    card: ModelCard,
    hardware: Hardware,
    wishes: TrainingWishes,
    method: Method,
    precision: Precision,
    dtype: DType,
    lora: LoraPreset | None,
) -> TrainingLoad:
    """Return what is tried first; its micro batch is set by the search."""
    checkpointing = wishes.gradient_checkpointing
    if checkpointing is None:
        checkpointing = lora.gradient_checkpointing if lora else False
    return TrainingLoad(
        card=card,
        method=method,
        precision=precision,
        compute_dtype=dtype,
        lora=lora,
        on_cpu=hardware.gpu is None,
        num_workers=_num_workers(hardware, wishes),
        micro_batch_size=1,
        max_length=wishes.max_length or min(DEFAULT_LENGTH, card.max_position_embeddings),
        gradient_checkpointing=checkpointing,
        layout=Layout(),
    )


def _effective(load: TrainingLoad, wishes: TrainingWishes) -> int:
    steps = load.lora.gradient_accumulation_steps if load.lora else 1
    return wanted_batch_size(load.card, load.precision, wishes, steps)


def candidates(
    load: TrainingLoad, hardware: Hardware, wishes: TrainingWishes, log: Log
) -> Iterator[tuple[TrainingLoad, Batch]]:
    """Yield what may be tried: smaller micro batches first, then checkpointing, then sharding and offload.

    A smaller micro batch costs little, checkpointing a third more compute, offload a trip to the RAM every step; on a
    CPU, where each worker has a copy of the model, one worker is the last resort.
    """
    checkpointing = [load.gradient_checkpointing]
    if wishes.gradient_checkpointing is None and not load.gradient_checkpointing:
        checkpointing.append(True)
    workers = [load.num_workers]
    if hardware.gpu is None and wishes.num_workers is None and load.num_workers > 1:
        workers.append(1)
    shapes = layouts(hardware, log, wishes, method=load.method, precision=load.precision, num_workers=load.num_workers)
    for count in workers:
        splits = batches(load.card, load.precision, wishes, effective=_effective(load, wishes), num_workers=count)
        for layout in shapes:
            for is_checkpointing in checkpointing:
                for batch in splits:
                    yield (
                        replace(
                            load,
                            num_workers=count,
                            layout=layout,
                            gradient_checkpointing=is_checkpointing,
                            micro_batch_size=batch.micro_batch_size,
                        ),
                        batch,
                    )


def tables(load: TrainingLoad, hardware: Hardware) -> tuple[MemoryTable, MemoryTable | None]:
    """Return the memory of one device, and of the RAM beside it where something is offloaded."""
    ram = int(hardware.ram_bytes * RAM_UTILIZATION)
    if hardware.gpu is None:
        return device_table(load, device="RAM", available_bytes=ram, num_shared=load.num_workers), None
    available = int(hardware.gpu.memory_bytes * GPU_MEMORY_UTILIZATION)
    device = device_table(load, device=f"each {hardware.gpu.name}", available_bytes=available)
    return device, host_table(load, available_bytes=ram)


def fit(load: TrainingLoad, hardware: Hardware, wishes: TrainingWishes, log: Log) -> tuple[TrainingLoad, Batch] | None:
    """Return the first candidate that fits and its batch, None if none does."""
    for candidate, batch in candidates(load, hardware, wishes, log):
        device, host = tables(candidate, hardware)
        if device.fits and (host is None or host.fits):
            return candidate, batch
    return None


def explain(
    load: TrainingLoad, batch: Batch, first: TrainingLoad, hardware: Hardware, wishes: TrainingWishes, log: Log
) -> None:
    """Write to `log` why the arrangement is what it is."""
    effective = _effective(load, wishes)
    whole = batch.effective(load.num_workers)
    if wishes.max_length:
        log.decide("max_length", load.max_length, "user", "asked for")
    else:
        log.decide("max_length", load.max_length, "default", "longer than nearly all chat samples")
    if wishes.num_workers:
        log.decide("num_workers", load.num_workers, "user", "asked for")
    elif load.layout.strategy == "dp":
        log.decide("num_workers", load.num_workers, "user", "nn.DataParallel is one process")
    elif load.num_workers < first.num_workers:
        log.decide("num_workers", load.num_workers, "memory", "each worker holds a copy of the model; two do not fit")
    else:
        log.decide("num_workers", load.num_workers, "hardware", "one a GPU" if hardware.gpu else "two share the cores")
    guess = batches(load.card, load.precision, wishes, effective=effective, num_workers=load.num_workers)[0]
    if wishes.micro_batch_size:
        log.decide("micro_batch_size", batch.micro_batch_size, "user", "asked for")
    elif batch.micro_batch_size < guess.micro_batch_size:
        reason = f"{guess.micro_batch_size} does not fit: {traps.BATCH_TABLE}"
        log.decide("micro_batch_size", batch.micro_batch_size, "memory", reason)
    else:
        log.decide("micro_batch_size", batch.micro_batch_size, "size rule", "the specification's table, and it fits")
    steps = batch.gradient_accumulation_steps
    kept = f"{batch.micro_batch_size} x {steps} x {load.num_workers} workers = {whole} samples a step"
    if wishes.gradient_accumulation_steps == steps:
        log.decide("gradient_accumulation_steps", steps, "user", f"asked for; {kept}")
    else:
        log.decide("gradient_accumulation_steps", steps, "memory", kept)
    if whole != effective:
        log.warn(f"The effective batch is {whole} samples instead of {effective}: {kept}.")
    if wishes.gradient_accumulation_steps not in (None, steps):
        log.warn(f"gradient_accumulation_steps is {steps} instead of {wishes.gradient_accumulation_steps}: {kept}.")
    _explain_checkpointing(load, first, wishes, log)


def _explain_checkpointing(load: TrainingLoad, first: TrainingLoad, wishes: TrainingWishes, log: Log) -> None:
    chosen = load.gradient_checkpointing
    if wishes.gradient_checkpointing is not None:
        log.decide("gradient_checkpointing", chosen, "user", "asked for")
    elif chosen != first.gradient_checkpointing:
        log.decide(
            "gradient_checkpointing", chosen, "memory", "one sample does not fit without; costs a third more time"
        )
    else:
        log.decide(
            "gradient_checkpointing", chosen, "size rule", "the LoRA preset" if load.lora else "off, and it fits"
        )
