"""Decoder layers in fewer operations: the same numbers as transformers' own layers."""

import asyncio
import copy
from pathlib import Path

import pytest
import torch
from greedy import assert_same, generate, limits
from test_engine import CONFIGS, PROMPTS, adapter_folder, answers, small_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cluster.models.bank import AdapterBank
from serve_apps import attention, fused_layer, packed_linear
from serve_apps.engine import Engine
from serve_apps.fused_layer import fuse_layers
from serve_apps.kernels import kernels
from serve_apps.packed_linear import pack_linears


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def small_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the steps in C, and as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(fused_layer, "kernels", lambda: None)
        monkeypatch.setattr(attention, "kernels", lambda: None)
        monkeypatch.setattr(packed_linear, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip("this machine has no C compiler")


IDS = torch.arange(2, 42).view(2, 20)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_fused_layers_give_the_logits_of_the_model(name: str) -> None:
    model = small_model(CONFIGS[name])
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            value.normal_()  # they start at zero
    expected = model(IDS).logits
    assert fuse_layers(model) == 2
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert fuse_layers(model) == 0  # done already


@torch.no_grad()
def test_a_biased_llama_keeps_its_biases() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_bias = config.mlp_bias = True
    model = small_model(config)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            value.normal_()
    expected = model(IDS).logits
    assert fuse_layers(model) == 2
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_fused_model_still_generates_with_a_cache() -> None:
    expected = generate(small_model(CONFIGS["llama"]), PROMPTS[5], 8)
    model = small_model(CONFIGS["llama"])
    fuse_layers(model)
    assert_same(small_model(CONFIGS["llama"]), PROMPTS[5], generate(model, PROMPTS[5], 8), expected)


@pytest.mark.parametrize("name", ["qwen2, sliding", "stablelm", "phimoe", "gpt2"])
def test_other_layers_stay_as_they_are(name: str) -> None:
    model = small_model(CONFIGS[name])
    before = [type(module) for module in model.modules()]
    assert fuse_layers(model) == 0
    assert [type(module) for module in model.modules()] == before


def test_quantized_layers_stay_as_they_are(tmp_path: Path) -> None:
    small_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    assert fuse_layers(model) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_answers_twenty_requests_as_generate_does(name: str) -> None:
    plain, model = small_model(CONFIGS[name]), small_model(CONFIGS[name])
    theirs = [generate(plain, prompt, 12) for prompt in PROMPTS]
    fuse_layers(model)
    pack_linears(model)
    engine = Engine(model, limits())
    engine.start()
    try:
        ours = asyncio.run(answers(engine))
    finally:
        engine.stop()
    for prompt, our, their in zip(PROMPTS, ours, theirs, strict=True):
        assert_same(plain, prompt, our, their)


@pytest.mark.parametrize("num_tokens", [16, 400], ids=["dense", "segments"])
@torch.no_grad()
def test_adapters_update_joined_products_as_they_update_single_ones(num_tokens: int, tmp_path: Path) -> None:
    folders = [adapter_folder(small_model(CONFIGS["llama"]), tmp_path / f"{i}", r=2 + 2 * i, seed=i) for i in range(2)]
    slots = torch.arange(num_tokens) % 3 - 1
    ids = torch.arange(num_tokens)[None] % 256 + 2
    logits = []
    for is_fused in (False, True):
        model = small_model(CONFIGS["llama"])
        if is_fused:
            assert fuse_layers(model) == 2
            pack_linears(model)
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
        bank = AdapterBank(model, num_slots=2, max_r=4, target_modules=targets)
        for slot, folder in enumerate(folders):
            bank.load_slot(slot, folder)
        bare = model(ids).logits
        with bank.tokens(slots):
            logits.append(model(ids).logits)
        assert not torch.allclose(logits[-1], bare, atol=0.1)
    assert torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)
