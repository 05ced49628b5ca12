"""How a model is fine-tuned on given hardware."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from cluster import traps
from cluster.hardware import Hardware
from cluster.memory import GIB, DoesNotFit, MemoryTable
from cluster.model_card import ModelCard, Precision
from cluster.plan_acceptance import explain_acceptance
from cluster.plan_batch import Batch
from cluster.plan_layout import explain_layout
from cluster.plan_method import choose_method, learning_rate, lora_settings, regularization
from cluster.plan_options import lighter_precisions, machine_groups
from cluster.plan_precision import choose_compute_dtype, is_quantized
from cluster.plan_record import Attempt, Log, memory_json, what_fits
from cluster.presets import Decision, DType, LearningRatePreset, LoraPreset, Method, Regularization, Strategy
from cluster.training_arrangement import DEFAULT_LENGTH, MIN_LENGTH, candidates, explain, first_load, fit, tables
from cluster.training_load import TrainingLoad
from cluster.training_wishes import TrainingWishes, read_wishes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """Every number that a fine-tuning run of one model needs."""

    card: ModelCard
    hardware: Hardware
    method: Method
    precision: Precision
    compute_dtype: DType
    lora: LoraPreset | None
    """None for full fine-tuning."""
    learning_rate_preset: LearningRatePreset
    regularization: Regularization
    micro_batch_size: int
    """Samples per worker in one forward pass."""
    gradient_accumulation_steps: int
    num_workers: int
    max_length: int
    """Tokens of the longest sample that is trained whole."""
    strategy: Strategy
    zero_stage: int
    """DeepSpeed's ZeRO stage; 0 with any other strategy."""
    offload_optimizer: bool
    offload_gradients: bool
    offload_param: bool
    gradient_checkpointing: bool
    memory: MemoryTable
    """Of one GPU, or of the RAM with all workers in it."""
    host_memory: MemoryTable | None
    """What is offloaded to the RAM of the node, or loaded there first by FSDP; None where nothing is."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate."""
        return self.learning_rate_preset.learning_rate

    @property
    def lr_scheduler_type(self) -> str:
        """Return the schedule's name in transformers."""
        return self.learning_rate_preset.lr_scheduler_type

    @property
    def effective_batch_size(self) -> int:
        """Return the samples per optimizer step: micro batch x accumulation x workers."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_workers

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON types."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        record["effective_batch_size"] = self.effective_batch_size
        record["memory"] |= memory_json(self.memory)
        if self.host_memory is not None:
            record["host_memory"] |= memory_json(self.host_memory)
        return record


def plan_training(
    card: ModelCard,
    hardware: Hardware,
    *,
    method: Method | None = None,
    precision: Precision | None = None,
    overrides: Mapping[str, object] | None = None,
    max_length: int | None = None,
    num_workers: int | None = None,
) -> TrainingPlan:
    """Return how `card` is fine-tuned on `hardware`; `overrides` are the fields of `training_wishes.OVERRIDES`.

    Raises:
        DoesNotFit: nothing within the given wishes fits; the text holds the sum and the nearest options.
        ImpossibleCombination: wishes that exclude each other, whatever the memory.
        BadOverride: a field that does not exist, or a value that it cannot have.
    """
    wishes = read_wishes(
        card, overrides or {}, method=method, precision=precision, max_length=max_length, num_workers=num_workers
    )
    try:
        return _plan(card, hardware, wishes)
    except DoesNotFit as error:
        raise DoesNotFit(f"{error} {what_fits(_options(card, hardware, wishes))}") from None


def _options(card: ModelCard, hardware: Hardware, wishes: TrainingWishes) -> Iterator[Iterable[Attempt]]:
    """Yield groups of changes to try, nearest first: LoRA on lighter weights, shorter or fewer samples, machines."""
    lighter = [p for p in lighter_precisions(card, hardware, wishes.precision) if is_quantized(p)]
    if wishes.method == "full":
        yield [("with method 'lora'", partial(_plan, card, hardware, replace(wishes, method="lora")))]
    yield [
        (f"with method 'qlora' at precision '{p}'", partial(_plan, card, hardware, _as_qlora(wishes, p)))
        for p in lighter
    ]
    longest = wishes.max_length or min(DEFAULT_LENGTH, card.max_position_embeddings)
    yield [
        (f"with max_length {n}", partial(_plan, card, hardware, replace(wishes, max_length=n)))
        for n in (longest // 2**k for k in range(1, 8))
        if n >= MIN_LENGTH
    ]
    if wishes.micro_batch_size is not None and wishes.micro_batch_size > 1:
        yield [("with micro_batch_size 1", partial(_plan, card, hardware, replace(wishes, micro_batch_size=1)))]
    yield from machine_groups(card, hardware, replace(wishes, num_workers=None), _plan)


def _as_qlora(wishes: TrainingWishes, precision: Precision) -> TrainingWishes:
    return replace(wishes, method="qlora", precision=precision)


def _plan(card: ModelCard, hardware: Hardware, wishes: TrainingWishes) -> TrainingPlan:
    log = Log()
    fits_fp32 = hardware.gpu is None and _fits_fp32(card, hardware, wishes)
    method, precision = choose_method(card, hardware, log, wishes, fits_fp32=fits_fp32)
    dtype = choose_compute_dtype(card, hardware, log, precision)
    lora = None if method == "full" else lora_settings(card, wishes, log)
    first = first_load(card, hardware, wishes, method, precision, dtype, lora)
    fitting = fit(first, hardware, wishes, log)
    if fitting is None:
        raise _does_not_fit(first, hardware, wishes)
    load, batch = fitting
    _refuse(load)
    explain(load, batch, first, hardware, wishes, log)
    explain_layout(card, load.layout, hardware, wishes, log, precision, dtype)
    rate = learning_rate(method, wishes, log)
    regularized = regularization(wishes, log)
    log.warn(traps.no_chat_template(card))
    explain_acceptance(card, lora, log, on_cpu=hardware.gpu is None)
    return _finish(load, batch, rate, regularized, hardware, log)


def _refuse(load: TrainingLoad) -> None:
    if load.lora is not None and load.lora.loraplus_lr_ratio != 1 and load.layout.zero_stage:
        raise traps.ImpossibleCombination(traps.LORAPLUS_ZERO)
    if load.layout.strategy == "fsdp" and load.compute_dtype == "float16":
        raise traps.ImpossibleCombination(traps.FSDP_FP16)


def _fits_fp32(card: ModelCard, hardware: Hardware, wishes: TrainingWishes) -> bool:
    lora = None if wishes.method == "full" else lora_settings(card, wishes, Log())
    method: Method = "lora" if lora else "full"
    load = first_load(card, hardware, wishes, method, "fp32", "float32", lora)
    return fit(load, hardware, wishes, Log()) is not None


def _does_not_fit(load: TrainingLoad, hardware: Hardware, wishes: TrainingWishes) -> DoesNotFit:
    """Return the error for the candidate that is nearest to fitting."""

    def excess(candidate: TrainingLoad) -> tuple[int, int]:
        device, host = tables(candidate, hardware)
        lacks = [t.total_bytes - t.available_bytes for t in (device, host) if t is not None]
        return max(lacks), device.total_bytes

    nearest = min((candidate for candidate, _ in candidates(load, hardware, wishes, Log())), key=excess)
    device, host = tables(nearest, hardware)
    table = host if host is not None and device.fits else device
    layout = nearest.layout
    how = f"ZeRO-{layout.zero_stage}" if layout.zero_stage else layout.strategy.upper()
    return DoesNotFit(
        f"{load.method} training of {load.card.name} at {load.precision} needs {table.as_sum()} of {table.device} at "
        f"micro batch {nearest.micro_batch_size} x {load.max_length} tokens with {how}"
        f"{' and gradient checkpointing' if nearest.gradient_checkpointing else ''}; {hardware} leaves "
        f"{table.available_bytes / GIB:.1f} GiB."
    )


def _finish(
    load: TrainingLoad,
    batch: Batch,
    rate: LearningRatePreset,
    regularized: Regularization,
    hardware: Hardware,
    log: Log,
) -> TrainingPlan:
    device, host = tables(load, hardware)
    layout = load.layout
    return TrainingPlan(
        card=load.card,
        hardware=hardware,
        method=load.method,
        precision=load.precision,
        compute_dtype=load.compute_dtype,
        lora=load.lora,
        learning_rate_preset=rate,
        regularization=regularized,
        micro_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        num_workers=load.num_workers,
        max_length=load.max_length,
        strategy=layout.strategy,
        zero_stage=layout.zero_stage,
        offload_optimizer=layout.offload_optimizer,
        offload_gradients=layout.offload_gradients,
        offload_param=layout.offload_param,
        gradient_checkpointing=load.gradient_checkpointing,
        memory=device,
        host_memory=host,
        decisions=tuple(log.decisions),
        warnings=tuple(log.warnings),
    )
