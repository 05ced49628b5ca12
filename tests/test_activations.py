"""The coefficients are counted anew: what autograd keeps in small models of the installed transformers and PEFT."""

from typing import Any

import pytest

from cluster.activations import ACTIVATIONS, activation_bytes
from cluster.catalog import find
from cluster.model_card import ModelCard
from cluster.presets import DType, Method

BATCH, LENGTH = 2, 64


def small(architecture: str, num_layers: int) -> ModelCard:
    names = {"llama": "smollm2-135m-instruct", "gpt2": "japanese-gpt2-small"}
    from dataclasses import replace

    return replace(
        find(names[architecture]),
        vocab_size=64,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4 if architecture == "llama" else 8,
        head_dim=32,
        max_position_embeddings=128,
    )


def kept_bytes(card: ModelCard, *, dtype: DType, method: Method, dropout: float, checkpointing: bool) -> int:
    import torch
    from peft import LoraConfig, get_peft_model
    from test_model_card import hub_config
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(hub_config(card), dtype=getattr(torch, dtype))
    if method == "lora":
        targets = list(card.target_modules)
        fan = card.model_type == "gpt2"
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=fan))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[torch.Tensor] = []
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        output = model(input_ids=ids, labels=ids)
    assert output.loss is not None
    return sum(sizes.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.1)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_more_layers_keep_what_the_formula_says(
    architecture: str, dtype: DType, method: Method, dropout: float
) -> None:
    counted = [
        kept_bytes(small(architecture, n), dtype=dtype, method=method, dropout=dropout, checkpointing=False)
        for n in (1, 3)
    ]
    planned = activation_bytes(
        small(architecture, 2),
        method=method,
        lora_dropout=dropout,
        compute_dtype=dtype,
        micro_batch_size=BATCH,
        max_length=LENGTH,
        gradient_checkpointing=False,
    )
    # never less than what is kept; Llama without dropout takes StableLM's slightly larger norm
    assert 0.995 <= planned / (counted[1] - counted[0]) <= 1.08


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_keeps_the_input_of_each_layer(dtype: DType) -> None:
    counted = [
        kept_bytes(small("llama", n), dtype=dtype, method="lora", dropout=0.1, checkpointing=True) for n in (1, 3)
    ]

    def planned(num_layers: int) -> int:
        return activation_bytes(
            small("llama", num_layers),
            method="lora",
            lora_dropout=0.1,
            compute_dtype=dtype,
            micro_batch_size=BATCH,
            max_length=LENGTH,
            gradient_checkpointing=True,
        )

    assert planned(3) - planned(1) == counted[1] - counted[0]
    assert planned(0) > 0  # the one layer that is computed again


def test_every_kind_of_layer_has_its_row() -> None:
    kinds, trained = {"gated", "plain"}, {"full", "lora", "lora+dropout"}
    assert set(ACTIVATIONS) == {(kind, what, size) for kind in kinds for what in trained for size in (2, 4)}


def test_activations_grow_with_tokens() -> None:
    def planned(micro_batch_size: int) -> int:
        return activation_bytes(
            find("smollm2-135m-instruct"),
            method="lora",
            lora_dropout=0.1,
            compute_dtype="float32",
            micro_batch_size=micro_batch_size,
            max_length=1024,
            gradient_checkpointing=False,
        )

    assert planned(4) == 4 * planned(1)
    # (64.7 x 576 + 20 x 1536 + 8 x 192) x 1024 tokens x 30 layers
    assert planned(1) == pytest.approx(69_523.2 * 1024 * 30, abs=1)
