"""DDP, ZeRO or FSDP, and what moves to the CPU: the layouts to try, lightest first, and why one was taken."""

from cluster import traps
from cluster.hardware import Hardware
from cluster.memory import weights_bytes
from cluster.model_card import ModelCard, Precision
from cluster.plan_precision import is_quantized
from cluster.plan_record import Log
from cluster.presets import DType, Method, offload_rule
from cluster.training_load import Layout
from cluster.training_wishes import TrainingWishes

OFFLOADS = ("offload_optimizer", "offload_gradients", "offload_param")


def layouts(
    hardware: Hardware, log: Log, wishes: TrainingWishes, *, method: Method, precision: Precision, num_workers: int
) -> list[Layout]:
    """Return the layouts that the wishes allow, from plain DDP to everything on the CPU.

    Raises:
        ImpossibleCombination: a strategy that excludes the precision or the offload that is wanted.
    """
    _check_strategy(hardware, wishes, log, precision)
    wanted = {name: value for name in OFFLOADS if (value := getattr(wishes, name)) is not None}
    if hardware.gpu is None and any(wanted.values()):
        log.warn("Offload moves state from a GPU to the CPU; there is no GPU here, so it is left out.")
        wanted = {}
    stage = wishes.zero_stage
    if wanted.get("offload_param"):
        stage = _stage_for_offloaded_parameters(wishes, log, wanted, precision)
    if stage == 3 and precision in ("int8", "gptq"):
        raise traps.ImpossibleCombination(traps.ZERO3_8BIT)
    ladder = _ladder(hardware, method=method, precision=precision, num_workers=num_workers)
    if wishes.strategy in ("ddp", "dp", "fsdp"):
        # Over several GPUs, what asks for nn.DataParallel gets DDP, as `_check_strategy` says.
        is_spread = wishes.strategy == "dp" and hardware.num_gpus > 1
        return [Layout(strategy="ddp" if is_spread else wishes.strategy)]
    kept = [x for x in ladder if stage in (None, x.zero_stage) and _agrees(x, wanted)]
    if wishes.strategy == "deepspeed":
        kept = [x for x in kept if x.zero_stage > 0]
    return kept or [_forced(stage, wanted)]


def _check_strategy(hardware: Hardware, wishes: TrainingWishes, log: Log, precision: Precision) -> None:
    if wishes.strategy == "dp":
        if is_quantized(precision):
            raise traps.ImpossibleCombination(traps.DATA_PARALLEL)
        log.warn(traps.DATA_PARALLEL_GPUS if hardware.num_gpus > 1 else traps.DATA_PARALLEL_SLOW)
    if wishes.strategy == "fsdp" and is_quantized(precision):
        raise traps.ImpossibleCombination(traps.FSDP_QUANTIZED)
    needs_zero = [name for name in OFFLOADS if getattr(wishes, name)] + (["zero_stage"] if wishes.zero_stage else [])
    if wishes.strategy in ("ddp", "dp", "fsdp") and needs_zero:
        raise traps.ImpossibleCombination(
            f"strategy '{wishes.strategy}' has no {', '.join(needs_zero)}: that is DeepSpeed's; use 'deepspeed'."
        )


def _stage_for_offloaded_parameters(
    wishes: TrainingWishes, log: Log, wanted: dict[str, bool], precision: Precision
) -> int | None:
    """Return stage 3, which `offload_param` needs; where it cannot be, drop the offload from `wanted` and say so."""
    if precision in ("int8", "gptq"):
        wanted.pop("offload_param")
        log.warn(f"offload_param is left out. {traps.ZERO3_8BIT}")
        return wishes.zero_stage
    if wishes.zero_stage not in (None, 3):
        log.warn(f"{traps.OFFLOAD_PARAM} Planned at stage 3 instead of {wishes.zero_stage}.")
    return 3


def _ladder(hardware: Hardware, *, method: Method, precision: Precision, num_workers: int) -> list[Layout]:
    state = {"offload_optimizer": True, "offload_gradients": True}
    ladder = [Layout()]
    if hardware.gpu is None:
        return [*ladder, _zero(2)]
    if num_workers > 1 and method == "full":
        ladder.append(_zero(2))
    ladder.append(_zero(2, **state))
    if precision not in ("int8", "gptq"):
        if num_workers > 1:
            ladder += [_zero(3), _zero(3, **state)]
        ladder.append(_zero(3, offload_param=True, **state))
    return ladder


def _zero(stage: int, **offloads: bool) -> Layout:
    return Layout(strategy="deepspeed" if stage else "ddp", zero_stage=stage, **offloads)


def _agrees(layout: Layout, wanted: dict[str, bool]) -> bool:
    return all(getattr(layout, name) == value for name, value in wanted.items())


def _forced(stage: int | None, wanted: dict[str, bool]) -> Layout:
    """Return the layout that the wishes spell out, where no rung of the ladder is like it."""
    needs = 1 if wanted.get("offload_optimizer") or wanted.get("offload_gradients") else 0
    return _zero(max(stage if stage is not None else 2 * needs, needs), **wanted)


def explain_layout(
    card: ModelCard,
    layout: Layout,
    hardware: Hardware,
    wishes: TrainingWishes,
    log: Log,
    precision: Precision,
    dtype: DType,
) -> None:
    """Write to `log` why the state lies where it lies, beside what the specification's thresholds say."""
    stage = layout.zero_stage
    fixed = wishes.zero_stage is not None or wishes.strategy is not None
    because = "asked for" if fixed else "all of it fits on every worker" if not stage else "the state must be shared"
    log.decide("strategy", layout.strategy, "user" if wishes.strategy else "memory", because)
    if stage:
        log.decide("zero_stage", stage, "user" if wishes.zero_stage else "memory", because)
    if stage == 3 and precision == "nf4":
        log.warn(traps.ZERO3_4BIT)
    if hardware.gpu is None:
        return
    size_gb = weights_bytes(card, precision, dtype) / 1e9
    rule = offload_rule(size_gb)
    by_rule = {
        "offload_optimizer": rule.offload_optimizer,
        "offload_gradients": rule.offload_gradients,
        "offload_param": rule.offload_layers or card.is_cpu_offload_required,
    }
    for name in OFFLOADS:
        _explain_offload(name, layout, by_rule[name], size_gb, card, wishes, log)


def _explain_offload(
    name: str, layout: Layout, by_rule: object, size_gb: float, card: ModelCard, wishes: TrainingWishes, log: Log
) -> None:
    chosen, wanted = getattr(layout, name), getattr(wishes, name)
    rule = f"the specification's thresholds for weights of {size_gb:.1f} GB say {'CPU' if by_rule else 'GPU'}"
    if card.is_cpu_offload_required and name == "offload_param":
        rule = "the specification has CPUオフロード: 必須 for this model"
    if wanted is not None and wanted == chosen:
        log.decide(name, chosen, "user", f"asked for; {rule}")
    elif chosen and by_rule:
        log.decide(name, chosen, "size rule", f"{rule}, and it does not fit otherwise")
    elif chosen:
        log.decide(name, chosen, "memory", f"{rule}; it does not fit without")
    elif by_rule:
        log.decide(name, chosen, "memory", f"{rule}; it fits on the GPU, where it is faster ({name}=true forces it)")
    else:
        log.decide(name, chosen, "size rule", rule)
