"""Which engine serves a model, and on how many GPUs of a replica it can be split."""

from typing import Literal

from cluster.hardware import Hardware
from cluster.model_card import ModelCard, Precision
from cluster.plan_record import Log
from cluster.presets import nominal_billions, size_class
from cluster.traps import ImpossibleCombination

Engine = Literal["vllm", "transformers"]


def vllm_obstacle(card: ModelCard, hardware: Hardware, precision: Precision, *, num_adapters: int) -> str | None:
    """Return why vLLM 0.29 cannot serve this, None if it can."""
    if not card.is_vllm_servable:
        published = " as it is published" if card.config_mapping else ""
        return f"vLLM 0.29 does not have {card.architecture}{published}"
    if precision == "int8":
        return "vLLM has no 8-bit bitsandbytes in flight"
    if precision == "nf4" and hardware.gpu is None:
        return "vllm-bnb-plugin loads 4-bit weights on GPUs only"
    if num_adapters and not card.is_vllm_lora_servable:
        return f"vLLM's {card.architecture} takes no LoRA adapters"
    return None


def choose_engine(
    card: ModelCard, hardware: Hardware, precision: Precision, log: Log, *, wanted: Engine | None, num_adapters: int
) -> Engine:
    """Return the engine, and write the reason to `log`.

    Raises:
        ImpossibleCombination: the engine that is wanted cannot serve this.
    """
    obstacle = vllm_obstacle(card, hardware, precision, num_adapters=num_adapters)
    if wanted == "vllm" and obstacle:
        raise ImpossibleCombination(f"{card.name} at {precision} on engine 'vllm': {obstacle}; use 'transformers'.")
    if precision == "gptq" and wanted != "transformers":
        log.decide("engine", "vllm", "user" if wanted else "model", "GPTQ checkpoints are in vLLM's core")
        return "vllm"
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


def tensor_parallel_sizes(card: ModelCard, hardware: Hardware, engine: Engine) -> list[int]:
    """Return the sizes to try, smallest first: powers of two that divide the heads and the key/value heads.

    The transformers engine runs on one GPU, and vLLM does not split a checkpoint that bitsandbytes has quantized.
    """
    if engine == "transformers" or card.checkpoint_quantization == "bitsandbytes":
        return [1]
    sizes = (2**power for power in range(max(1, hardware.num_gpus).bit_length()))
    return [n for n in sizes if card.num_attention_heads % n == 0 and card.num_key_value_heads % n == 0]
