"""What the specification asks for and the libraries do not do, each with the message that the user reads."""

from collections.abc import Mapping

from cluster.errors import UserError
from cluster.model_card import ModelCard


class ImpossibleCombination(UserError, ValueError):
    """Settings that exclude each other, whatever the memory."""


DEAD_8BIT_KNOBS = ("bnb_8bit_compute_dtype", "bnb_8bit_use_double_quant")

AUTO_GPTQ = (
    "The specification's auto-gptq is no longer maintained, and GPTQ needs calibration data: it is a job that writes a "
    "checkpoint, not a switch at load time. Loaded as int8 by bitsandbytes; give a GPTQ checkpoint to load that."
)
OFFLOAD_PARAM = "offload_param has no effect at ZeRO stage 2 or below: parameters leave the GPU only at stage 3."
DATA_PARALLEL = (
    "nn.DataParallel cannot copy quantized weights to its replicas: use strategy 'ddp', one process per GPU."
)
DATA_PARALLEL_SLOW = (
    "nn.DataParallel is one process, whatever there is: 'ddp' gives the same gradients and uses all of it."
)
DATA_PARALLEL_GPUS = (
    "nn.DataParallel would copy the model to every GPU at every step, and its threads share what tells samples and "
    "adapters apart; planned as 'ddp', one process per GPU, which gives the same gradients."
)
DATA_PARALLEL_WORKERS = "strategy 'dp' is one process: leave num_workers out, or use 'ddp'."
BATCH_TABLE = "the table's batch size is a first guess; memory decides, and the effective batch stays the same"
ZERO3_4BIT = (
    "ZeRO-3 shards 4-bit weights only with bnb_4bit_quant_storage equal to the model's dtype; "
    "prove it with a short run first."
)
FULL_FP16 = "Full fine-tuning in fp16 loses small updates: use precision fp32, or bf16 on a GPU that has it."
LORAPLUS_ZERO = (
    "loraplus_lr_ratio gives A and B rates of their own, and DeepSpeed gets all adapters as one group with one rate: "
    "use --set strategy=ddp, or strategy=fsdp where an unquantized base has to be sharded."
)
REFUSED_SETTINGS = {
    "use_dora": (
        "use_dora is refused: vLLM serves no DoRA adapters, and in a mixed batch its norm of W + BA would be a product "
        "with the whole of W for each adapter and layer; use_rslora=true or a higher r are served everywhere"
    ),
    "init_lora_weights": (
        "init_lora_weights is refused: PiSSA, OLoRA and LoftQ change the base itself, which is shared by all adapters"
    ),
    "modules_to_save": (
        "modules_to_save is refused: trained embeddings or heads are a base of their own; method 'full' trains them"
    ),
}
"""Settings of PEFT's `LoraConfig` whose result could not be served beside other adapters."""
FSDP_QUANTIZED = "FSDP cannot shard int8 or 4-bit weights as bitsandbytes stores them: use strategy 'ddp' or ZeRO-2."
FSDP_FP16 = (
    "FSDP in fp16 is not proven: each worker would scale its own part of the loss. Use strategy 'deepspeed' with "
    "zero_stage 3, or precision fp32."
)
ZERO3_8BIT = "ZeRO-3 cannot shard int8 or GPTQ weights: use ZeRO-2 or DDP, or nf4 with bnb_4bit_quant_storage."
MODELFILE_TEMPLATE = (
    "The specification's Modelfile template [INST] ... [/INST] and its stop words fit Llama-2 models only: "
    "TEMPLATE, stop and num_ctx are built from this model's own chat template."
)

FOUR_BITS_ON_CPU = "vLLM 0.29 multiplies 4-bit weights on a CPU with AVX-512 (cpu_gemm_wna16)"
INT8_ON_CPU = (
    "On a CPU without VNNI, products of int8 weights beyond +-63 saturate without a word: "
    "take a checkpoint that was quantized to that range, or a CPU with AVX512-VNNI or AVX-VNNI."
)


def check_8bit_settings(settings: Mapping[str, object]) -> None:
    """Refuse the two 8-bit knobs of the specification, which `BitsAndBytesConfig` would swallow silently.

    Raises:
        ImpossibleCombination: one of them is in `settings`.
    """
    dead = [knob for knob in DEAD_8BIT_KNOBS if knob in settings]
    if dead:
        raise ImpossibleCombination(
            f"{' and '.join(dead)}: BitsAndBytesConfig has no such setting and would ignore it without a word; the "
            "8-bit settings are llm_int8_threshold, llm_int8_skip_modules and llm_int8_enable_fp32_cpu_offload."
        )


def layers_on_cpu(layer_bytes: int, num_layers: int) -> str:
    """Return why quantized layers on the CPU are no way out: how large they get."""
    return (
        "bitsandbytes refuses layers on the CPU unless llm_int8_enable_fp32_cpu_offload=True, and then those layers "
        f"stay unquantized: {layer_bytes / 1e9:.1f} GB each in 16 bit, {layer_bytes * num_layers / 1e9:.0f} GB for all "
        f"{num_layers}."
    )


def warmup_clamped(warmup_steps: int, total_steps: int, clamped: int) -> str:
    """Return the message for a warm-up that is longer than a sensible share of its run."""
    return (
        f"warmup_steps {warmup_steps} in a run of {total_steps} steps would "
        f"{'never reach' if warmup_steps >= total_steps else 'hardly ever reach'} the learning rate: "
        f"shortened to {clamped} steps."
    )


def experts_stay_unquantized(card: ModelCard) -> str:
    """Return what quantizing a mixture of experts saves."""
    kept = 2 * (card.num_parameters() - card.num_linear_parameters())
    return (
        f"transformers 5 keeps {card.name}'s experts as 3-D parameters, which bitsandbytes does not convert: "
        f"{kept / 1e9:.1f} of {2 * card.num_parameters() / 1e9:.1f} GB would stay in 16 bit."
    )


def no_chat_template(card: ModelCard) -> str | None:
    """Return the warning for a tokenizer on which `apply_chat_template` would raise, None where there is a template."""
    if card.has_tokenizer_chat_template or card.chat_template:
        return None
    return (
        f"{card.name}: neither its tokenizer nor the catalog has a chat template, so apply_chat_template would raise: "
        "set chat_template in models.toml; completions of plain text work."
    )


def export_notes(card: ModelCard) -> tuple[str, ...]:
    """Return what to know before this model goes to Ollama."""
    notes = []
    if card.licence != "Llama 2":
        notes.append(MODELFILE_TEMPLATE)
    if not card.is_ollama_importable:
        notes.append(
            f"Ollama imports Llama and Qwen2 safetensors, not {card.architecture}"
            + (
                ": convert to GGUF first."
                if card.is_gguf_convertible
                else ", and llama.cpp's converter refuses it too."
            )
        )
    notes.append(
        "Adapters are merged into the unquantized base (merging into 4-bit weights ruins them); "
        "`ollama push` needs a name of the form user/name."
    )
    return tuple(notes)
