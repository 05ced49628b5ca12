"""Full, LoRA or QLoRA, and the settings that go with it."""

from dataclasses import replace

from cluster.hardware import Hardware
from cluster.model_card import PREQUANTIZED, ModelCard, Precision
from cluster.plan_precision import choose_precision, half_precision, is_quantized
from cluster.plan_record import Log
from cluster.presets import (
    LEARNING_RATES,
    RANKS,
    LearningRatePreset,
    LoraPreset,
    Method,
    Regularization,
    lora_preset,
    lora_preset_name,
    nominal_billions,
)
from cluster.training_wishes import TrainingWishes
from cluster.traps import FULL_FP16, ImpossibleCombination

LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "loraplus_lr_ratio")


def choose_method(
    card: ModelCard, hardware: Hardware, log: Log, wishes: TrainingWishes, *, fits_fp32: bool
) -> tuple[Method, Precision]:
    """Return the method and the precision of the base: each can decide the other.

    Raises:
        ImpossibleCombination: the two that are wanted exclude each other, or the checkpoint can only be served.
    """
    if card.checkpoint_quantization in PREQUANTIZED:
        raise ImpossibleCombination(
            f"{card.name} is published as {card.checkpoint_quantization}, which can be served, not trained on: name "
            "the unquantized checkpoint, with precision 'nf4' where it has to be small."
        )
    method = wishes.method
    if method is None:
        precision = choose_precision(card, hardware, log, wanted=wishes.precision, fits_fp32=fits_fp32)
        method = "qlora" if is_quantized(precision) else "lora"
        log.decide("method", method, "default", f"adapters on a frozen {precision} base")
        return method, precision
    _check(card, wishes, method)
    log.decide("method", method, "user", "asked for")
    if method == "qlora":
        return method, _quantized(card, hardware, log, wishes, fits_fp32=fits_fp32)
    return method, _unquantized(card, hardware, log, wishes, method, fits_fp32=fits_fp32)


def _check(card: ModelCard, wishes: TrainingWishes, method: Method) -> None:
    is_wanted_quantized = wishes.precision is not None and is_quantized(wishes.precision)
    if method == "qlora" and wishes.precision is not None and not is_wanted_quantized:
        raise ImpossibleCombination(f"method 'qlora' trains on quantized weights, not {wishes.precision}: use 'lora'.")
    if method != "qlora" and (is_wanted_quantized or card.checkpoint_quantization):
        what = wishes.precision if is_wanted_quantized else f"{card.name}, published as {card.checkpoint_quantization}"
        raise ImpossibleCombination(f"method '{method}' needs unquantized weights, not {what}: use 'qlora'.")


def _quantized(card: ModelCard, hardware: Hardware, log: Log, wishes: TrainingWishes, *, fits_fp32: bool) -> Precision:
    trial = Log()
    precision = choose_precision(card, hardware, trial, wanted=wishes.precision, fits_fp32=fits_fp32)
    if is_quantized(precision):
        log.decisions += trial.decisions
        log.warn(*trial.warnings)
        return precision
    # The size rule, or the CPU, would not quantize: QLoRA was asked for, and its 4 bits are NF4 (arXiv:2305.14314).
    log.warn(*(w for w in trial.warnings if "float32" not in w))
    choose_precision(card, hardware, Log(), wanted="nf4", fits_fp32=fits_fp32)
    log.decide("precision", "nf4", "user", "method 'qlora' was asked for, which trains on 4-bit weights")
    return "nf4"


def _unquantized(
    card: ModelCard, hardware: Hardware, log: Log, wishes: TrainingWishes, method: Method, *, fits_fp32: bool
) -> Precision:
    trial = Log()
    if wishes.precision is not None or nominal_billions(card) < 7:
        plain = replace(card, recommended_precision=None) if wishes.precision is None else card
        precision = choose_precision(plain, hardware, trial, wanted=wishes.precision, fits_fp32=fits_fp32)
    else:
        precision = half_precision(hardware)
        why = f"method '{method}' was asked for, which trains on unquantized weights"
        trial.decide("precision", precision, "user", why)
    if method == "full" and precision == "fp16":
        if wishes.precision is not None:
            raise ImpossibleCombination(FULL_FP16)
        log.decide("precision", "fp32", "hardware", "the GPU has no bf16, and weights in fp16 lose small updates")
        return "fp32"
    log.decisions += trial.decisions
    log.warn(*trial.warnings)
    return precision


def lora_settings(card: ModelCard, wishes: TrainingWishes, log: Log) -> LoraPreset:
    """Return the preset of the model's size (or the one that is named) with the user's values, and write why."""
    preset = lora_preset(card, wishes.lora_preset)
    changed = {name: value for name in LORA_FIELDS if (value := getattr(wishes, name)) is not None}
    if "r" in changed and "lora_alpha" not in changed:
        # All presets scale by lora_alpha / r = 2: a rank of the user's own keeps the scale.
        changed["lora_alpha"] = 2 * changed["r"]
    lora = replace(preset, **changed)
    origin = f"LoRA preset '{wishes.lora_preset or lora_preset_name(card)}'"
    for name in LORA_FIELDS:
        value = getattr(lora, name)
        is_all = value == card.target_modules
        shown = f"all {len(value)} linears" if is_all else ",".join(value) if isinstance(value, tuple) else value
        if getattr(wishes, name) is not None:
            log.decide(name, shown, "user", "asked for")
        elif name in changed:
            log.decide(name, shown, "default", "twice the rank, as in every preset")
        else:
            log.decide(name, shown, "user" if wishes.lora_preset else "size rule", origin)
    if lora.r not in RANKS:
        log.warn(f"r={lora.r} is outside the specification's {RANKS.start} to {RANKS.stop - 1}.")
    return lora


def learning_rate(method: Method, wishes: TrainingWishes, log: Log) -> LearningRatePreset:
    """Return the method's learning rate and schedule with the user's values, and write why."""
    preset = LEARNING_RATES[method]
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio")
    changed = {name: value for name in names if (value := getattr(wishes, name)) is not None}
    if "warmup_steps" in changed:
        changed["warmup_ratio"] = None
    elif "warmup_ratio" in changed:
        changed["warmup_steps"] = None
    rate = replace(preset, **changed)
    for name in names:
        value = getattr(rate, name)
        if value is not None:
            by_user = getattr(wishes, name) is not None
            note = "; at most a tenth of the run, however short" if name == "warmup_steps" else ""
            reason = ("asked for" if by_user else f"the specification's {method}_finetuning") + note
            log.decide(name, value, "user" if by_user else "default", reason)
    return rate


def regularization(wishes: TrainingWishes, log: Log) -> Regularization:
    """Return weight decay, clipping and noise with the user's values, and write why."""
    names = ("weight_decay", "max_grad_norm", "neftune_noise_alpha")
    wanted = {name: value for name in names if (value := getattr(wishes, name)) is not None}
    chosen = Regularization(**wanted)
    for name in names:
        by_user = name in wanted
        reason = "asked for" if by_user else "transformers' own; the specification is silent"
        log.decide(name, getattr(chosen, name), "user" if by_user else "default", reason)
    return chosen
