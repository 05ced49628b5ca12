"""The plan of one trial: beside others on one base where that can be, else as a run of its own, and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from cluster.catalog import find
from cluster.hardware import Hardware
from cluster.memory import GIB, DoesNotFit
from cluster.plan import TrainingPlan, plan_training
from cluster.traps import ImpossibleCombination
from tune_spaces.arguments import SearchRequest
from tune_spaces.pack_plan import PackPlan, fits_packed, left_out_text, plan_packs, prune_packed, without
from tune_spaces.points import check_methods, num_points
from tune_spaces.shapes import longest_of
from tune_spaces.spaces import is_varied, space_of
from tune_spaces.values import BadSpace, Choice, Space

BATCH = "micro_batch_size"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPlan:
    """How trials are trained, and how many at a time."""

    plan: TrainingPlan
    """Of one trial by itself."""
    alone_because: str | None
    """Why each trial is a run of its own; None where trials share a base."""
    space: Space
    """Without what does not fit."""
    left_out: str | None
    """What does not, in words."""
    num_trials: int
    packs: PackPlan
    """Trials that are runs of their own are packs of one, each with all of its workers."""


def plan_trials(request: SearchRequest, hardware: Hardware) -> TrialPlan:
    """Return the plan of the search that `request` asks for on `hardware`.

    Raises:
        BadSpace, DoesNotFit, ImpossibleCombination, BadOverride: Nothing is left to try, or it cannot be done.
    """
    request, (plan, alone_because), too_long = _without_long(request, hardware)
    asked = space_of(request.space, plan, request.changes)
    check_methods(asked, searcher=request.searcher, scheduler=request.scheduler)
    is_packed = alone_because is None
    asked, too_many = without(asked, BATCH, partial(_fits_batch, request, plan, is_packed=is_packed))
    largest = _largest(request, plan, asked)
    if is_packed:
        space, too_large = prune_packed(asked, largest, num_workers=request.num_workers)
    else:
        _check_launched(request)
        space, too_large = without(asked, "r", lambda r: _replanned(request, largest, {"r": r}) is not None)
    left_out = "; ".join(filter(None, (too_long, too_many, too_large))) or None
    if left_out and not is_varied(space):
        raise BadSpace(f"{left_out}; then there is nothing to search. Give other values, or a lighter precision.")
    count = num_points(space, searcher=request.searcher, trials=request.trials)
    pack = plan_packs if is_packed else _runs
    packs = pack(largest, max_r=_max_r(space, plan), num_trials=count, num_workers=request.num_workers)
    return TrialPlan(
        plan=plan,
        alone_because=alone_because,
        space=space,
        left_out=left_out,
        num_trials=count,
        packs=packs,
    )


def _without_long(
    request: SearchRequest, hardware: Hardware
) -> tuple[SearchRequest, tuple[TrainingPlan, str | None], str | None]:
    """Return `request` without the longest values of max_length that do not fit, its `_plan`, and those in words.

    Raises:
        DoesNotFit: Not even the shortest does.
    """
    out: list[int] = []
    while True:
        try:
            planned = _plan(request, hardware)
        except DoesNotFit:
            lengths, longest = request.changes.get("max_length"), longest_of(request.changes)
            if longest is None or not isinstance(lengths, Choice) or len(lengths.values) == 1:
                raise
            out.append(longest)
            kept = Choice(values=tuple(value for value in lengths.values if value != longest))
            request = replace(request, changes={**request.changes, "max_length": kept})
        else:
            return request, planned, left_out_text("max_length", sorted(out)) if out else None


def _plan(request: SearchRequest, hardware: Hardware) -> tuple[TrainingPlan, str | None]:
    plan = _planner(request, hardware)
    if (request.workers_per_trial or 1) > 1:
        return plan(request.workers_per_trial), f"--workers-per-trial {request.workers_per_trial}"
    try:
        one = plan(1)
    except DoesNotFit:
        if hardware.num_gpus < 2 or request.workers_per_trial:
            raise
        one = None
    if one is None or (one.strategy == "deepspeed" and hardware.num_gpus > 1 and not request.workers_per_trial):
        several = plan(None)
        return several, f"a trial needs {several.num_workers} GPUs ({several.strategy}, stage {several.zero_stage})"
    if one.method == "full":
        return one, "full fine-tuning changes the base itself"
    return one, f"the strategy is {one.strategy}" if one.strategy != "ddp" else None


def _planner(request: SearchRequest, hardware: Hardware) -> Callable[[int | None], TrainingPlan]:
    longest = [n for n in (request.max_length, longest_of(request.changes)) if n is not None]

    def plan(num_workers: int | None) -> TrainingPlan:
        return plan_training(
            find(request.model),
            hardware,
            method=request.method or "lora",
            precision=request.precision,
            overrides=request.overrides,
            max_length=max(longest, default=None),
            num_workers=num_workers,
        )

    return plan


def _replanned(request: SearchRequest, plan: TrainingPlan, changes: Mapping[str, int]) -> TrainingPlan | None:
    """Return `plan` with `changes` and all else as it is; None where that does not fit."""
    kept = {
        BATCH: plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "strategy": plan.strategy,
    }
    asked = {field: value for field, value in request.overrides.items() if field != "effective_batch_size"}
    try:
        return plan_training(
            plan.card,
            plan.hardware,
            method=plan.method,
            precision=plan.precision,
            overrides={**asked, **kept, **changes},
            max_length=plan.max_length,
            num_workers=plan.num_workers,
        )
    except DoesNotFit:
        return None


def _fits_batch(request: SearchRequest, plan: TrainingPlan, size: int, *, is_packed: bool) -> bool:
    larger = _replanned(request, plan, {BATCH: size})
    if larger is None or not is_packed or larger.lora is None:
        return larger is not None
    return fits_packed(larger, larger.lora.r, request.num_workers)


def _largest(request: SearchRequest, plan: TrainingPlan, space: Space) -> TrainingPlan:
    """Return the plan of the trial with the largest micro batch, which is the one that has to fit."""
    sizes = space.get(BATCH)
    size = max(int(size) for size in sizes.values) if isinstance(sizes, Choice) else plan.micro_batch_size
    larger = _replanned(request, plan, {BATCH: size}) if size > plan.micro_batch_size else None
    return larger or plan


def _max_r(space: Space, plan: TrainingPlan) -> int:
    ranks = space.get("r")
    own = plan.lora.r if plan.lora else 0
    return max([own, *(int(r) for r in ranks.values)]) if isinstance(ranks, Choice) else own


def _check_launched(request: SearchRequest) -> None:
    if request.scheduler == "pbt":
        raise ImpossibleCombination(
            "--scheduler pbt copies weights between trials on one base, and here each trial is a run of its own; "
            "use asha, median or fifo."
        )


def _runs(plan: TrainingPlan, *, max_r: int, num_trials: int, num_workers: int | None) -> PackPlan:
    hardware = plan.hardware
    there = hardware.num_gpus if hardware.gpu else hardware.num_cpus
    if plan.num_workers > there:
        kind = "GPUs" if hardware.gpu else "cores"
        raise ImpossibleCombination(
            f"A trial has {plan.num_workers} workers; there are {there} {kind}. Give --workers-per-trial {there}."
        )
    fit = there // plan.num_workers
    if not hardware.gpu:  # all trials share one RAM
        fit = min(fit, max(1, plan.memory.available_bytes // plan.memory.total_bytes))
    at_a_time = min(num_workers or fit, num_trials)
    if at_a_time > fit:
        raise DoesNotFit(
            f"{at_a_time} trials at a time of {plan.num_workers} workers and {plan.memory.total_bytes / GIB:.1f} GiB "
            f"each do not fit; at most --num-workers {fit}."
        )
    return PackPlan(num_slots=1, num_workers=at_a_time, max_r=max_r, memory_bytes=plan.memory.total_bytes)
