"""The named search spaces, each a function from a training plan's own choice to what is tried around it."""

from collections.abc import Callable, Mapping

from cluster.plan import TrainingPlan
from tune_spaces.shapes import SHAPE_FIELDS
from tune_spaces.values import BadSpace, Choice, Range, Space, Values

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "qkv_proj")
"""Names of attention's linears over the catalog's architectures."""
TARGETS = {"attention": "attention's linears alone", "all": "all linears of the plan"}


LORA_FIELDS = frozenset({"r", "lora_alpha", "lora_dropout", "targets", "use_rslora"})
"""Fields of adapters; full fine-tuning has none of them."""
RANKS = (4, 8, 16, 32, 64)
ALPHAS = (8, 16, 32, 64, 128)


def quick(plan: TrainingPlan) -> Space:
    """Return the learning rate alone, a factor of ten around the plan's."""
    return {"learning_rate": _around(plan.learning_rate, factor=10)}


def standard(plan: TrainingPlan) -> Space:
    """Return rank 4 to 64, alpha, and the learning rate within a factor of ten of the plan's.

    The plan's own rank and alpha are in it, whatever they are.
    """
    if plan.lora is None:
        return quick(plan)
    return {
        "r": Choice(values=tuple(sorted({*RANKS, plan.lora.r}))),
        "lora_alpha": Choice(values=tuple(sorted({*ALPHAS, plan.lora.lora_alpha}))),
        "learning_rate": _around(plan.learning_rate, factor=10),
    }


def wide(plan: TrainingPlan) -> Space:
    """Return `standard` with targets, dropout, weight decay and the schedule, and a wider learning rate."""
    space = {
        **standard(plan),
        "learning_rate": _around(plan.learning_rate, factor=30),
        "weight_decay": Choice(values=tuple(sorted({0.0, 0.01, 0.1, plan.regularization.weight_decay}))),
        "lr_scheduler_type": Choice(values=("linear", "cosine", "constant_with_warmup")),
    }
    if plan.lora is not None:
        if 0 < sum(target in ATTENTION for target in plan.lora.target_modules) < len(plan.lora.target_modules):
            space["targets"] = Choice(values=tuple(TARGETS))
        space["lora_dropout"] = Choice(values=tuple(sorted({0.0, 0.05, 0.1, plan.lora.lora_dropout})))
    return space


SPACES: Mapping[str, Callable[[TrainingPlan], Space]] = {"quick": quick, "standard": standard, "wide": wide}


def _around(value: float, *, factor: float) -> Range:
    low, high = BOUNDS["learning_rate"]
    return Range(low=max(low, value / factor), high=min(high, value * factor))


BOUNDS: Mapping[str, tuple[float, float]] = {
    "r": (1, 512),
    "lora_alpha": (1, 4096),
    "learning_rate": (1e-8, 1.0),
    "lora_dropout": (0.0, 0.9),
    "weight_decay": (0.0, 1.0),
    "max_grad_norm": (1e-6, 1e6),
    "neftune_noise_alpha": (0.0, 1000.0),
    "seed": (0, 2**31),
    "micro_batch_size": (1, 1024),
    "gradient_accumulation_steps": (1, 1024),
    "max_length": (8, 2**20),
}
WORDS: Mapping[str, tuple[str | bool, ...]] = {
    "targets": tuple(TARGETS),
    "lr_scheduler_type": ("linear", "cosine", "constant_with_warmup"),
    "use_rslora": (True, False),
}
WHOLE = frozenset({"r", "lora_alpha", "seed", *SHAPE_FIELDS})
"""Fields that are whole numbers."""


def space_of(name: str, plan: TrainingPlan, changes: Mapping[str, Values]) -> Space:
    """Return the space called `name` with the user's `changes`, every value within its bounds.

    Raises:
        BadSpace: No such space, no such field, a value that it cannot have, or nothing left to try.
    """
    if name not in SPACES:
        raise BadSpace(f"There is no space {name!r}; choose one of {', '.join(SPACES)}.")
    space = {**SPACES[name](plan), **changes}
    for field, values in space.items():
        _check(field, values)
        if plan.lora is None and field in LORA_FIELDS:
            raise BadSpace(f"Full fine-tuning has no {field}; leave it out of the space.")
    if not is_varied(space):
        raise BadSpace("Every field has one value, so there is nothing to search; give one several, as in r=8,16.")
    return space


def is_varied(space: Space) -> bool:
    """Return whether there is more than one point to try."""
    return any(isinstance(values, Range) or len(values.values) > 1 for values in space.values())


def _check(field: str, values: Values) -> None:
    known = [*BOUNDS, *WORDS]
    if field not in known:
        raise BadSpace(f"There is no field {field!r} to search; choose from {', '.join(known)}.")
    if field in WORDS:
        wrong = [v for v in values.values if v not in WORDS[field]] if isinstance(values, Choice) else [values]
        if wrong:
            raise BadSpace(f"{field} cannot be {wrong[0]}; choose from {', '.join(map(str, WORDS[field]))}.")
        return
    low, high = BOUNDS[field]
    for value in values.values if isinstance(values, Choice) else (values.low, values.high):
        if isinstance(value, str):
            raise BadSpace(f"{field}={value} is no number; its bounds are {low:g} to {high:g}.")
        if not low <= value <= high:
            raise BadSpace(f"{field}={value} is outside of its bounds, {low:g} to {high:g}.")
        if field in WHOLE and (isinstance(values, Range) or value != int(value)):
            raise BadSpace(f"{field} takes whole numbers; list them, as in {field}=8,16,32.")
