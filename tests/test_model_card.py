import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from by_hand import FACTS

from cluster.architectures import ARCHITECTURES, canonical_name
from cluster.catalog_rows import ROWS
from cluster.model_card import ModelCard


def hub_config(card: ModelCard) -> Any:
    """The transformers configuration that the card's numbers describe."""
    from transformers import AutoConfig

    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    numbers: dict[str, Any] = {
        "vocab_size": card.vocab_size,
        "tie_word_embeddings": card.tie_word_embeddings,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if card.model_type == "gpt2":
        numbers |= {key: getattr(card, value) for key, value in names.items()}
        return AutoConfig.for_model(
            "gpt2", n_inner=card.intermediate_size, n_positions=card.max_position_embeddings, **numbers
        )
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers |= {name: getattr(card, name) for name in (*same, "max_position_embeddings")}
    if card.num_local_experts:
        numbers |= {"num_local_experts": card.num_local_experts, "num_experts_per_tok": card.num_experts_per_tok}
        numbers |= {"lm_head_bias": card.lm_head_bias}
    if card.model_type in ("llama", "phimoe"):
        numbers |= {"attention_bias": card.attention_bias}
    if card.model_type == "qwen3":  # its default is not hidden size over heads
        numbers |= {"head_dim": card.head_dim}
    return AutoConfig.for_model(card.model_type, **numbers)


@pytest.mark.parametrize("card", ROWS, ids=lambda card: card.name)
def test_every_row_counts_like_the_model_on_the_meta_device(card: ModelCard) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hub_config(card))
    assert type(model).__name__ == card.architecture
    assert card.num_parameters() == sum(p.numel() for p in model.parameters())
    # what bitsandbytes converts: exactly nn.Linear or Conv1D (a router is a subclass), and not the head
    converted = [
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and name != "lm_head"
    ]
    assert card.num_linear_parameters() == sum(converted)
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(card.target_modules) <= leaves


def test_parameters_are_those_of_the_fact_sheet() -> None:
    assert {card.name: card.num_parameters() for card in ROWS} == {n: facts.params for n, facts in FACTS.items()}


def test_a_token_of_phi_moe_passes_through_6_6_billion_parameters() -> None:
    phi = next(card for card in ROWS if card.num_local_experts)
    assert round(phi.num_active_parameters() / 1e9, 1) == 6.6
    # 41,873,153,344 - 14 idle experts x 32 layers x 3 x 4096 x 6400
    assert phi.num_active_parameters() == 41_873_153_344 - 14 * 32 * 3 * 4096 * 6400


def test_a_dense_model_uses_all_of_its_parameters() -> None:
    assert ROWS[1].num_active_parameters() == ROWS[1].num_parameters()


def test_adapters_go_on_the_linears_of_each_architecture() -> None:
    by_architecture = {card.architecture: card.target_modules for card in ROWS}
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert by_architecture["LlamaForCausalLM"] == by_architecture["Qwen2ForCausalLM"] == seven
    assert by_architecture["StableLmForCausalLM"] == seven
    assert by_architecture["PhimoeForCausalLM"] == seven[:4]
    assert by_architecture["GPT2LMHeadModel"] == ("c_attn", "c_proj", "c_fc")


def test_published_architecture_names_lead_to_the_classes_of_transformers() -> None:
    assert canonical_name("PhiMoEForCausalLM") == "PhimoeForCausalLM"
    assert canonical_name("StableLMEpochForCausalLM") == "StableLmForCausalLM"
    assert canonical_name("MambaForCausalLM") is None


def test_every_architecture_is_a_class_of_transformers() -> None:
    import transformers

    assert ARCHITECTURES
    for name, row in ARCHITECTURES.items():
        assert getattr(transformers, name).config_class.model_type == row.model_type


def vllm_models() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model_executor" / "models"


def test_vllm_flags_are_those_of_its_sources() -> None:
    # read as text: importing vLLM takes half a minute
    registered = dict(re.findall(r'"(\w+)": \(\s*"(\w+)"', (vllm_models() / "registry.py").read_text()))
    assert ARCHITECTURES
    for name, row in ARCHITECTURES.items():
        published = [n for n in (name, *row.published_names) if n in registered]
        assert row.is_vllm_servable == bool(published), name
        module = (vllm_models() / f"{registered[published[0]]}.py").read_text()
        takes_lora = re.search(r"class \w+ForCausalLM\([^)]*SupportsLoRA", module) is not None
        if "ForCausalLM(LlamaForCausalLM" not in module:  # Mistral inherits it from Llama
            assert row.is_vllm_lora_servable == takes_lora, name


def test_json_holds_facts_and_counts() -> None:
    record = json.loads(json.dumps(ROWS[0].to_json()))
    assert record["num_parameters"] == 134_515_008
    assert record["model_type"] == "llama"
    assert record["target_modules"][0] == "q_proj"
