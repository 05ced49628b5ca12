"""Which engines will take what a run trains, said before anything is loaded."""

from collections.abc import Iterator

from cluster.model_card import ModelCard
from cluster.plan_engine import lora_obstacle
from cluster.plan_record import Log
from cluster.presets import LoraPreset, lora_preset
from cluster.serving_arrangement import max_lora_rank

RESULT_RUNS_ON = "runs_on"
"""The decision that says so."""


def explain_acceptance(card: ModelCard, lora: LoraPreset | None, log: Log, *, on_cpu: bool) -> None:
    """Write to `log` which engines take the adapter, or with `lora` None the whole model, and why the others do not."""
    obstacles = {
        "transformers": None,
        "vllm": _vllm_obstacle(card, lora, on_cpu=on_cpu),
        "gguf": _gguf_obstacle(card),
    }
    notes = [f"not {engine}: {why}" for engine, why in obstacles.items() if why]
    notes += [] if obstacles["gguf"] else _gguf_notes(lora)
    taken = [engine for engine, why in obstacles.items() if why is None]
    log.decide(RESULT_RUNS_ON, ", ".join(taken), "model", "; ".join(notes) or "nothing in it is special to one")
    log.warn(*_warnings(card, lora))


def _vllm_obstacle(card: ModelCard, lora: LoraPreset | None, *, on_cpu: bool) -> str | None:
    if not card.is_vllm_servable:
        return f"vLLM 0.29 does not have {card.architecture} as it is published"
    return None if lora is None else lora_obstacle(card, on_cpu=on_cpu)


def _gguf_obstacle(card: ModelCard) -> str | None:
    if not card.is_gguf_convertible:
        return f"llama.cpp's converter does not take {card.name}"
    if card.checkpoint_quantization == "bitsandbytes":
        return "llama.cpp's converter does not read weights that bitsandbytes has quantized"
    return None


def _gguf_notes(lora: LoraPreset | None) -> Iterator[str]:
    if lora is not None:
        yield "gguf once merged into the unquantized base"
    if lora is not None and lora.use_rslora:
        # convert_lora_to_gguf.py writes lora_alpha alone, and llama.cpp scales by lora_alpha / r.
        yield "as a GGUF adapter it would be scaled by alpha / r, which rsLoRA is not"


def _warnings(card: ModelCard, lora: LoraPreset | None) -> Iterator[str]:
    if lora is None:
        return
    room = max_lora_rank(lora_preset(card).r)
    if lora.r > room:
        yield (
            f"r={lora.r} is above the {room} that serving plans for: such an adapter is refused unless the model is "
            f"served with max_lora_rank: {max_lora_rank(lora.r)} in a Serve config."
        )
