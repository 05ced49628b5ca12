"""The precision of the weights: user, then model, then size rule; the hardware has the last word on dtypes."""

from cluster import traps
from cluster.hardware import VNNI, Hardware
from cluster.memory import WEIGHT_BYTES
from cluster.model_card import PREQUANTIZED, ModelCard, Precision
from cluster.plan_record import Log
from cluster.presets import QUANTIZATION_RULES, DType, Source, size_class

_DTYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_MANUAL_DTYPES: dict[Precision, DType] = {"nf4": "float16", "int8": "bfloat16", "gptq": "float16"}
"""手動量子化設定: the compute dtype of a quantization that the size rule did not choose. It names no AWQ and no
compressed-tensors, which take what GPTQ takes."""


def is_quantized(precision: Precision) -> bool:
    """Return whether the linears are held in fewer than 16 bits."""
    return precision not in WEIGHT_BYTES


def choose_precision(
    card: ModelCard, hardware: Hardware, log: Log, *, wanted: Precision | None, fits_fp32: bool
) -> Precision:
    """Return what is loaded, and write the reason to `log`.

    Raises:
        ImpossibleCombination: the checkpoint cannot be loaded at the precision that is wanted.
    """
    precision, source, reason = (
        _from_checkpoint(card, wanted)
        or _from_user(card, hardware, log, wanted)
        or _from_cpu(hardware, fits_fp32=fits_fp32)
        or _from_model(card, hardware)
        or _from_size(card, hardware, log)
    )
    log.decide("precision", precision, source, reason)
    if is_quantized(precision) and card.num_local_experts:
        log.warn(traps.experts_stay_unquantized(card))
    if card.is_quantization_required and (precision == "int8" or not is_quantized(precision)):
        log.warn(f"The specification requires {card.name} in 4 bits (量子化: 4bit必須); {precision} was chosen.")
    return precision


_Choice = tuple[Precision, Source, str]


def _from_checkpoint(card: ModelCard, wanted: Precision | None) -> _Choice | None:
    method = card.checkpoint_quantization
    if method is None:
        if wanted in PREQUANTIZED:
            name = "compressed-tensors" if wanted == "compressed-tensors" else str(wanted).upper()
            raise traps.ImpossibleCombination(
                f"{card.name} is no {name} checkpoint, and {name} needs calibration data: quantize it in a job "
                "first, or use precision 'int8' or 'nf4', which need none."
            )
        return None
    by_method: dict[str, Precision] = {name: name for name in PREQUANTIZED}
    by_method["bitsandbytes"] = "int8" if card.checkpoint_bits == 8 else "nf4"
    if method not in by_method:
        raise traps.ImpossibleCombination(
            f"{card.name} is published quantized with {method!r}; planned are {', '.join(by_method)} and unquantized."
        )
    if wanted not in (None, by_method[method]):
        raise traps.ImpossibleCombination(
            f"{card.name} is published as {by_method[method]}: it cannot be loaded as {wanted}; "
            "name the unquantized checkpoint instead."
        )
    return by_method[method], "model", f"the checkpoint is published quantized with {method}"


def _from_user(card: ModelCard, hardware: Hardware, log: Log, wanted: Precision | None) -> _Choice | None:
    if wanted is None:
        return None
    if wanted == "bf16" and hardware.gpu is not None and not hardware.gpu.has_bf16:
        log.warn(f"{hardware.gpu.name} has no bf16 (it needs compute capability 8.0): fp16 instead.")
        return "fp16", "hardware", f"bf16 was asked for; {hardware.gpu.name} has none"
    if hardware.gpu is None and wanted != "fp32":
        log.warn(
            "On a CPU fp32 is the fast precision: bf16 products are 7 to 9 times slower, nf4 and int8 save memory only."
        )
    if card.recommended_precision not in (None, wanted):
        return wanted, "user", f"asked for (the specification recommends {card.recommended_precision})"
    return wanted, "user", "asked for"


def _from_cpu(hardware: Hardware, *, fits_fp32: bool) -> _Choice | None:
    if hardware.gpu is not None or not fits_fp32:
        return None
    return "fp32", "hardware", "fp32 is the fast precision on a CPU, and it fits; nf4 and int8 only save memory"


def _from_model(card: ModelCard, hardware: Hardware) -> _Choice | None:
    if card.recommended_precision is None:
        return None
    word = "必須" if card.is_quantization_required else "推奨"
    too_large = "" if hardware.gpu else "; fp32, the fast precision of a CPU, does not fit"
    label = "4bit" if card.recommended_precision == "nf4" else "8bit"
    return card.recommended_precision, "model", f"the specification's 量子化: {label}{word} for this model{too_large}"


def _from_size(card: ModelCard, hardware: Hardware, log: Log) -> _Choice:
    name = size_class(card)
    rule = QUANTIZATION_RULES[name]
    if rule.bits and card.num_local_experts:
        return half_precision(hardware), "model", traps.experts_stay_unquantized(card)
    if rule.method == "auto-gptq":
        log.warn(traps.AUTO_GPTQ)
    if rule.bits is None:
        if hardware.gpu is not None:
            better = half_precision(hardware)
            log.warn(f"The size rule keeps models below 7B in float32; {better} halves the memory and is faster here.")
        return "fp32", "size rule", f"{name}: no quantization, float32"
    return rule.precision, "size rule", f"{name}: {rule.bits} bit by {rule.method}"


def half_precision(hardware: Hardware) -> Precision:
    """Return the 16-bit format of the hardware: bf16 from Ampere on, fp16 before; fp32 on a CPU."""
    if hardware.gpu is None:
        return "fp32"
    return "bf16" if hardware.gpu.has_bf16 else "fp16"


def choose_compute_dtype(card: ModelCard, hardware: Hardware, log: Log, precision: Precision) -> DType:
    """Return the dtype of activations, cache and unquantized weights, and write the reason to `log`."""
    if not is_quantized(precision):
        log.decide("compute_dtype", _DTYPES[precision], "default", f"unquantized {precision} weights compute in kind")
        return _DTYPES[precision]
    if hardware.gpu is None:
        if precision in PREQUANTIZED and card.checkpoint_bits == 8 and not hardware.has_cpu_feature(*VNNI):
            log.warn(traps.INT8_ON_CPU)
        if precision in PREQUANTIZED and card.checkpoint_bits != 8:
            if not hardware.has_cpu_feature("avx512f"):
                log.warn(f"{traps.FOUR_BITS_ON_CPU}; on another one it does not start.")
            log.decide("compute_dtype", "bfloat16", "hardware", "vLLM's 4-bit kernel for CPUs takes 16-bit activations")
            return "bfloat16"
        log.decide("compute_dtype", "float32", "hardware", "a CPU multiplies float32 fastest")
        return "float32"
    name = size_class(card)
    rule = QUANTIZATION_RULES[name]
    is_by_rule = rule.precision == precision
    dtype = rule.compute_dtype if is_by_rule else _MANUAL_DTYPES.get(precision, _MANUAL_DTYPES["gptq"])
    origin = f"the size rule of {name}" if is_by_rule else f"the specification's manual {precision} settings"
    if dtype == "bfloat16" and not hardware.gpu.has_bf16:
        log.warn(f"{hardware.gpu.name} has no bf16: compute_dtype float16 instead of {origin}'s bfloat16.")
        log.decide("compute_dtype", "float16", "hardware", f"{origin} says bfloat16; {hardware.gpu.name} has none")
        return "float16"
    better = "; bfloat16 has more range at the same speed" if dtype == "float16" and hardware.gpu.has_bf16 else ""
    log.decide("compute_dtype", dtype, "size rule" if is_by_rule else "default", origin + better)
    return dtype
