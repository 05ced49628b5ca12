"""Which engine serves a model, and on how many GPUs of a replica it can be split."""

from typing import Literal

from cluster.hardware import Hardware
from cluster.model_card import PREQUANTIZED, ModelCard, Precision
from cluster.plan_record import Log
from cluster.presets import nominal_billions, size_class
from cluster.traps import FOUR_BITS_ON_CPU, ImpossibleCombination

Engine = Literal["vllm", "transformers"]

LAST_VLLM_WITH_STABLELM_EPOCH = "0.28.0"
"""From `_PREVIOUSLY_SUPPORTED_MODELS` in vLLM's registry; the keys that need mapping are that class's."""


def vllm_obstacle(card: ModelCard, hardware: Hardware, precision: Precision, *, num_adapters: int) -> str | None:
    """Return why vLLM 0.29 cannot serve this, None if it can."""
    if not card.is_vllm_servable:
        published = f" as it is published: {LAST_VLLM_WITH_STABLELM_EPOCH} was the last" if card.config_mapping else ""
        return f"vLLM 0.29 does not have {card.architecture}{published}"
    if obstacle := _weights_obstacle(card, hardware, precision):
        return obstacle
    return lora_obstacle(card, on_cpu=hardware.gpu is None) if num_adapters else None


def lora_obstacle(card: ModelCard, *, on_cpu: bool) -> str | None:
    """Return why vLLM 0.29 serves no adapters on this base, None if it does."""
    if not card.is_vllm_lora_servable:
        return f"vLLM's {card.architecture} takes no LoRA adapters"
    if on_cpu and card.checkpoint_quantization == "compressed-tensors" and card.checkpoint_bits == 8:
        # oneDNN repacks the weights and the layer lets go of them; LoRA looks at them for their device.
        return "vLLM 0.29 has no LoRA on int8 weights on a CPU"
    return None


def _weights_obstacle(card: ModelCard, hardware: Hardware, precision: Precision) -> str | None:
    on_cpu = hardware.gpu is None
    bits = card.checkpoint_bits
    if precision == "int8":
        return "vLLM has no 8-bit bitsandbytes in flight"
    if precision == "nf4" and on_cpu:
        return "vllm-bnb-plugin loads 4-bit weights on GPUs only"
    if precision == "gptq" and not card.checkpoint_is_symmetric:
        return "vLLM 0.29 takes symmetric GPTQ only (`sym: true`); older versions had a kernel for the other kind"
    if precision == "gptq" and bits not in ((4,) if on_cpu else (4, 8)):
        return f"vLLM 0.29 takes GPTQ in {'4 bits on a CPU' if on_cpu else '4 or 8 bits'}, not {bits}"
    if precision == "awq" and bits not in (None, 4):
        return f"vLLM 0.29 takes AWQ in 4 bits, not {bits}"
    if precision in PREQUANTIZED and bits != 8 and on_cpu and hardware.has_cpu_feature("avx512f") is False:
        return f"{FOUR_BITS_ON_CPU}, which this one lacks; 8-bit compressed-tensors needs none"
    if precision == "compressed-tensors" and on_cpu and card.checkpoint_is_float:
        return "vLLM 0.29 multiplies small floats (FP8) on GPUs only; integers of 8 or 4 bits work on a CPU"
    return None


def choose_engine(
    card: ModelCard, hardware: Hardware, precision: Precision, log: Log, *, wanted: Engine | None, num_adapters: int
) -> Engine:
    """Return the engine, and write the reason to `log`.

    Raises:
        ImpossibleCombination: the engine that is wanted cannot serve this.
    """
    obstacle = vllm_obstacle(card, hardware, precision, num_adapters=num_adapters)
    if precision in PREQUANTIZED:
        return _engine_of_prequantized(card, precision, log, wanted=wanted, obstacle=obstacle)
    if wanted == "vllm" and obstacle:
        raise ImpossibleCombination(f"{card.name} at {precision} on engine 'vllm': {obstacle}; use 'transformers'.")
    if wanted is not None:
        log.decide("engine", wanted, "user", "asked for")
        return wanted
    if hardware.gpu is None:
        log.decide("engine", "transformers", "hardware", "on a CPU its continuous batching is the faster of the two")
        return "transformers"
    if obstacle:
        log.decide("engine", "transformers", "model", obstacle)
        return "transformers"
    if nominal_billions(card) < 7:
        log.decide("engine", "transformers", "size rule", "below 7B its continuous batching serves and starts faster")
        return "transformers"
    plugin = ", 4-bit by vllm-bnb-plugin" if precision == "nf4" else ""
    log.decide("engine", "vllm", "size rule", f"{size_class(card)}: paged attention and tensor parallelism{plugin}")
    return "vllm"


def _engine_of_prequantized(
    card: ModelCard, precision: Precision, log: Log, *, wanted: Engine | None, obstacle: str | None
) -> Engine:
    if wanted == "transformers" or obstacle:
        why = obstacle or f"{precision} checkpoints are served by vLLM alone"
        instead = "name the unquantized checkpoint, with precision 'int8' or 'nf4' where it has to be small"
        raise ImpossibleCombination(f"{card.name} on engine '{wanted or 'vllm'}': {why}; {instead}.")
    log.decide("engine", "vllm", "user" if wanted else "model", f"{precision} checkpoints are in vLLM's core")
    return "vllm"


def tensor_parallel_sizes(card: ModelCard, hardware: Hardware, engine: Engine) -> list[int]:
    """Return the sizes to try, smallest first: powers of two that divide the heads and the key/value heads.

    The transformers engine runs on one GPU, and vLLM does not split a checkpoint that bitsandbytes has quantized.
    """
    if engine == "transformers" or card.checkpoint_quantization == "bitsandbytes":
        return [1]
    sizes = (2**power for power in range(max(1, hardware.num_gpus).bit_length()))
    return [n for n in sizes if card.num_attention_heads % n == 0 and card.num_key_value_heads % n == 0]
