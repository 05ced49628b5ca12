"""What the caller of a training plan fixed: names and values, read from text too (`--set r=16`)."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from cluster.errors import UserError
from cluster.model_card import ModelCard, Precision
from cluster.presets import Method, PresetName, SchedulerType, Strategy
from cluster.traps import REFUSED_SETTINGS


class BadOverride(UserError, ValueError):
    """A setting that is not one, or a value that it cannot have; all of them are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWishes:
    """What the caller fixed; None is left to the plan."""

    method: Method | None = None
    precision: Precision | None = None
    max_length: int | None = None
    num_workers: int | None = None

    lora_preset: PresetName | None = None
    r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    target_modules: tuple[str, ...] | None = None
    use_rslora: bool | None = None
    loraplus_lr_ratio: float | None = None
    learning_rate: float | None = None
    lr_scheduler_type: SchedulerType | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    neftune_noise_alpha: float | None = None
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    effective_batch_size: int | None = None
    """Samples per optimizer step, over all workers and micro batches."""
    gradient_checkpointing: bool | None = None
    strategy: Strategy | None = None
    zero_stage: int | None = None
    offload_optimizer: bool | None = None
    offload_gradients: bool | None = None
    offload_param: bool | None = None


def _whole(low: int, high: int | None = None) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = int(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or number < low or (high and number > high):
            raise ValueError(f"a whole number {f'from {low} to {high}' if high else f'of at least {low}'}")
        return number

    return read


def _real(low: float, high: float, *, is_low_allowed: bool = True) -> Callable[[object], float]:
    def read(value: object) -> float:
        is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        number = float(value) if is_number else float("nan")  # type: ignore[arg-type]  # narrowed by is_number
        if not (low < number < high or (is_low_allowed and number == low)):
            raise ValueError(f"a number {'from' if is_low_allowed else 'above'} {low:g}, below {high:g}")
        return number

    return read


def _choice(kind: Any) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return str(value)

    return read


def _yes_or_no(value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    answer = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(answer, bool):
        raise ValueError("true or false")
    return answer


def _names(value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
        raise ValueError("one or more module names, separated by commas")
    return tuple(n.strip() for n in names)


OVERRIDES: dict[str, Callable[[object], object]] = {
    "lora_preset": _choice(PresetName),
    "r": _whole(1, 512),
    "lora_alpha": _whole(1),
    "lora_dropout": _real(0.0, 1.0),
    "target_modules": _names,
    "use_rslora": _yes_or_no,
    "loraplus_lr_ratio": _real(0.0, 1000.0, is_low_allowed=False),
    "learning_rate": _real(0.0, 1.0, is_low_allowed=False),
    "lr_scheduler_type": _choice(SchedulerType),
    "warmup_steps": _whole(0),
    "warmup_ratio": _real(0.0, 1.0),
    "weight_decay": _real(0.0, 1.0),
    "max_grad_norm": _real(0.0, 1e6, is_low_allowed=False),
    "neftune_noise_alpha": _real(0.0, 1000.0),
    "micro_batch_size": _whole(1),
    "gradient_accumulation_steps": _whole(1),
    "effective_batch_size": _whole(1),
    "gradient_checkpointing": _yes_or_no,
    "strategy": _choice(Strategy),
    "zero_stage": _whole(0, 3),
    "offload_optimizer": _yes_or_no,
    "offload_gradients": _yes_or_no,
    "offload_param": _yes_or_no,
}
"""Every field that `plan_training(overrides=...)` takes, and how its value is read; r up to what vLLM can serve."""


def read_wishes(
    card: ModelCard,
    overrides: Mapping[str, object],
    *,
    method: Method | None,
    precision: Precision | None,
    max_length: int | None,
    num_workers: int | None,
) -> TrainingWishes:
    """Return the wishes, values read from text where they are text.

    Raises:
        BadOverride: names that are no settings, and values that they cannot have.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in REFUSED_SETTINGS:
            problems.append(REFUSED_SETTINGS[name])
            continue
        try:
            values[name] = OVERRIDES[name](value)
        except KeyError:
            near = difflib.get_close_matches(name, OVERRIDES, n=1)
            problems.append(f"there is no {name!r}" + (f" (meant {near[0]!r}?)" if near else ""))
        except ValueError as error:
            problems.append(f"{name}={value!r} is not {_expected(name, value, error)}")
    problems += _contradictions(card, values)
    limits = {"max_length": (max_length, card.max_position_embeddings), "num_workers": (num_workers, None)}
    for name, (number, limit) in limits.items():
        if number is not None and (number < 1 or (limit is not None and number > limit)):
            problems.append(
                f"{name}={number} is not from 1 to {limit}" if limit else f"{name}={number} is not positive"
            )
    if problems:
        raise BadOverride(f"Training {card.name}: {'; '.join(problems)}. Settings: {', '.join(OVERRIDES)}.")
    return TrainingWishes(method=method, precision=precision, max_length=max_length, num_workers=num_workers, **values)


def _expected(name: str, value: object, error: ValueError) -> str:
    """Return what the value should have been; `int("x")` raises a ValueError of its own that does not say so."""
    text = str(error)
    return "a number" if "literal" in text or "could not convert" in text else text or f"a {name}, got {value!r}"


def _contradictions(card: ModelCard, values: Mapping[str, Any]) -> list[str]:
    problems = []
    if "warmup_steps" in values and "warmup_ratio" in values:
        problems.append("warmup_steps and warmup_ratio exclude each other")
    if {"micro_batch_size", "gradient_accumulation_steps", "effective_batch_size"} <= set(values):
        problems.append("of micro_batch_size, gradient_accumulation_steps and effective_batch_size two fix the third")
    unknown = [name for name in values.get("target_modules", ()) if name not in card.target_modules]
    if unknown:
        problems.append(
            f"target_modules {', '.join(unknown)} cannot carry LoRA in {card.architecture}, "
            f"which has {', '.join(card.target_modules)}"
        )
    return problems
