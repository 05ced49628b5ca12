"""The architectures whose parts we can count: the shape of their layers, and who else can run them."""

from dataclasses import dataclass
from typing import Literal

GATED_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The specification's seven target modules: the linears of a Llama-like layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How one class of transformers builds its layers."""

    name: str
    """Class name in transformers 5.19."""
    model_type: str
    attention: Literal["split", "fused"] = "split"
    """`split`: linears q, k, v, o; `fused`: GPT-2's c_attn and c_proj."""
    mlp: Literal["gated", "plain", "experts"] = "gated"
    """`gated`: gate, up, down; `plain`: GPT-2's c_fc and c_proj; `experts`: 3-D parameters behind a router."""
    vectors_per_norm: Literal[1, 2] = 1
    """RMSNorm has a weight; LayerNorm has a weight and a bias."""
    has_qk_norm: bool = False
    """Whether each layer normalises queries and keys per head (Qwen3)."""
    has_position_embeddings: bool = False
    target_modules: tuple[str, ...] = GATED_LINEARS
    """The linears that can carry LoRA."""
    published_names: tuple[str, ...] = ()
    """Further names in the `architectures` field of published files."""

    is_vllm_servable: bool = True
    """Whether vLLM 0.29 has it (`vllm/model_executor/models/registry.py`)."""
    is_vllm_lora_servable: bool = True
    """Whether vLLM's class for it declares `SupportsLoRA`."""
    is_ollama_importable: bool = False
    """Whether `ollama create` imports its safetensors."""


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(name="LlamaForCausalLM", model_type="llama", is_ollama_importable=True),
        Architecture(name="MistralForCausalLM", model_type="mistral"),
        Architecture(name="Qwen2ForCausalLM", model_type="qwen2", is_ollama_importable=True),
        Architecture(name="Qwen3ForCausalLM", model_type="qwen3", has_qk_norm=True),
        Architecture(
            name="StableLmForCausalLM",
            model_type="stablelm",
            vectors_per_norm=2,
            published_names=("StableLMEpochForCausalLM",),
            is_vllm_lora_servable=False,
        ),
        Architecture(
            name="PhimoeForCausalLM",
            model_type="phimoe",
            mlp="experts",
            vectors_per_norm=2,
            # The experts are parameters, not linears: PEFT's LoRA layer and bitsandbytes both pass them by.
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
            published_names=("PhiMoEForCausalLM",),
        ),
        Architecture(
            name="GPT2LMHeadModel",
            model_type="gpt2",
            attention="fused",
            mlp="plain",
            vectors_per_norm=2,
            has_position_embeddings=True,
            target_modules=("c_attn", "c_proj", "c_fc"),
            is_vllm_lora_servable=False,
        ),
    )
}


def canonical_name(published: str) -> str | None:
    """Return transformers' class name for an `architectures` entry of a `config.json`, None if it is not known."""
    for row in ARCHITECTURES.values():
        if published == row.name or published in row.published_names:
            return row.name
    return None
