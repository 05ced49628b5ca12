"""How many trials fit on one base, from the memory of the plan for one of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.activations import PASS_TOKENS, cpu_pass_tokens
from cluster.memory import GIB, DoesNotFit
from cluster.plan import TrainingPlan
from tune_spaces.trial_jobs import adapter_bytes
from tune_spaces.values import BadSpace, Choice, Space

MAX_SLOTS = 16
"""More trials in one pass gain nothing: by then the products are as large as the processor likes them."""
SHARED = frozenset({"weights", "process", "unpacked linear", "logits"})
"""Items of the memory table that a pack has once, as activations; all others it has once for each trial."""
NOUNS = {"r": "rank", "micro_batch_size": "micro_batch_size"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """The packs of a search."""

    num_slots: int
    """Trials on one base."""
    num_workers: int
    """Bases; one for each GPU, or one on a CPU with all of its cores."""
    max_r: int
    memory_bytes: int
    """Of one worker with all slots in use."""

    @property
    def num_trials(self) -> int:
        """Return the trials at a time."""
        return self.num_slots * self.num_workers


def plan_packs(plan: TrainingPlan, *, max_r: int, num_trials: int, num_workers: int | None = None) -> PackPlan:
    """Return how `num_trials` with ranks up to `max_r` are packed; `plan` is that of one trial on one worker.

    Raises:
        DoesNotFit: Not even one trial of that rank fits.
    """
    workers = num_workers or (plan.hardware.num_gpus if plan.hardware.gpu else 1)
    workers = min(workers, num_trials)
    shared, each = pack_bytes(plan, max_r=max_r)
    fit = (plan.memory.available_bytes // _sharers(plan, workers) - shared) // each
    if fit < 1:
        raise DoesNotFit(
            f"One trial with r={max_r} needs {(shared + each) / GIB:.1f} GiB beside {workers - 1} other workers; "
            f"there are {plan.memory.available_bytes / GIB:.1f} GiB. Give smaller ranks, or a smaller micro_batch_size."
        )
    slots = min(fit, MAX_SLOTS, -(-num_trials // workers))
    return PackPlan(num_slots=slots, num_workers=workers, max_r=max_r, memory_bytes=shared + slots * each)


def pack_bytes(plan: TrainingPlan, *, max_r: int) -> tuple[int, int]:
    """Return the bytes that the trials of a pack share, and those of each trial with rank `max_r`.

    Trials take turns in passes, and what one pass keeps is gone before the next one.
    """
    shared = sum(item.num_bytes for item in plan.memory.items if item.name in SHARED)
    num_tokens = plan.micro_batch_size * plan.max_length
    if plan.hardware.gpu is None:
        num_tokens = cpu_pass_tokens(micro_batch_size=plan.micro_batch_size, max_length=plan.max_length)
    activations = plan.memory.num_bytes("activations")
    together = max(activations, activations * PASS_TOKENS // num_tokens)
    return shared + together, adapter_bytes(plan, r=max_r)


def prune_packed(space: Space, plan: TrainingPlan, *, num_workers: int | None) -> tuple[Space, str | None]:
    """Return `space` without the ranks of which not even one trial fits on a base, and what was left out, in words.

    Raises:
        BadSpace: No rank fits.
    """
    try:
        return without(space, "r", lambda r: fits_packed(plan, r, num_workers))
    except BadSpace as error:
        shared, each = pack_bytes(plan, max_r=min(int(r) for r in space["r"].values))  # type: ignore[union-attr] # a Choice
        raise BadSpace(
            f"{error} The smallest needs {(shared + each) / GIB:.1f} GiB, there are "
            f"{plan.memory.available_bytes / GIB:.1f}. Use a lighter precision or a smaller micro_batch_size."
        ) from None


def without(space: Space, field: str, fits: Callable[[int], bool]) -> tuple[Space, str | None]:
    """Return `space` with the values of `field` that fit, and what was left out, in words.

    Raises:
        BadSpace: None fits.
    """
    values = space.get(field)
    if not isinstance(values, Choice):
        return space, None
    kept = tuple(value for value in values.values if fits(int(value)))
    if not kept:
        raise BadSpace(
            f"No {NOUNS[field]} of {', '.join(map(str, values.values))} fits into memory; give smaller ones."
        )
    if len(kept) == len(values.values):
        return space, None
    return {**space, field: Choice(values=kept)}, left_out_text(field, [v for v in values.values if v not in kept])


def left_out_text(field: str, values: Iterable[object]) -> str:
    """Return what is said of `values` of `field` that nobody tries."""
    return f"{field}={', '.join(map(str, values))} does not fit into memory and is left out"


def fits_packed(plan: TrainingPlan, r: int, num_workers: int | None) -> bool:
    """Return whether one trial of rank `r` fits on each base."""
    try:
        plan_packs(plan, max_r=r, num_trials=num_workers or 1, num_workers=num_workers)
    except DoesNotFit:
        return False
    return True


def _sharers(plan: TrainingPlan, num_workers: int) -> int:
    return 1 if plan.hardware.gpu else num_workers  # on a CPU all workers share one RAM
