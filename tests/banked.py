"""Tiny models of each family, and PEFT adapters for them, for tests of the bank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from cluster.models.adapter_spec import AdapterSpec

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tiny_qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def tiny_stablelm() -> PreTrainedModel:
    return StableLmForCausalLM(StableLmConfig(**SIZES))


def tiny_gpt2() -> PreTrainedModel:
    # rates of GPT-2's own dropout, which would differ between a pack and a solo run
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    return GPT2LMHeadModel(config)


FAMILIES = [
    pytest.param(tiny_llama, LLAMA_TARGETS, id="llama"),
    pytest.param(tiny_qwen2, LLAMA_TARGETS, id="qwen2"),
    pytest.param(tiny_stablelm, LLAMA_TARGETS, id="stablelm"),
    pytest.param(tiny_gpt2, GPT2_TARGETS, id="gpt2"),
]


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def filled(model: PreTrainedModel, spec: AdapterSpec, folder: Path, *, seed: int) -> Path:
    """Save a PEFT adapter of `spec` with random A and B, made by PEFT alone."""
    torch.manual_seed(seed)
    peft = get_peft_model(copy_of(model), peft_config(spec))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(str(folder))
    return folder


def peft_config(spec: AdapterSpec) -> LoraConfig:
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=list(spec.target_modules),
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
    )


def some_ids(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=input_ids).logits
    return result
