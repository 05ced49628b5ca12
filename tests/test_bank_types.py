"""Adapters in float32 on bases in other types."""

from pathlib import Path

import pytest
import torch
from banked import LLAMA_TARGETS, copy_of, filled, logits, some_ids, tiny_llama
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from cluster.models.adapter_spec import AdapterSpec
from cluster.models.bank import AdapterBank


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


def test_a_4_bit_base_gives_pefts_logits_and_gradients(llama_folder: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def load() -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
        return model

    spec = AdapterSpec(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS)
    folder = filled(AutoModelForCausalLM.from_pretrained(llama_folder), spec, tmp_path / "a", seed=2)
    peft = PeftModel.from_pretrained(load(), str(folder), is_trainable=True).train()
    model = load().train()
    bank = AdapterBank(model, num_slots=2, max_r=4, target_modules=LLAMA_TARGETS)
    bank.load_slot(0, folder)
    bank.load_slot(1, folder)
    input_ids = some_ids(2, 8)
    theirs = peft(input_ids=input_ids, labels=input_ids).loss
    theirs.backward()
    with bank.rows([0, 1]):
        ours = model(input_ids=input_ids, labels=input_ids).loss
        ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    grads = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    for name, layer in bank.layers.items():
        assert layer.lora_A.grad is not None
        expected = grads[f"base_model.model.{name}.lora_A.default.weight"]
        # each row has a slot of its own here, one adapter shares both there
        torch.testing.assert_close(layer.lora_A.grad.sum(0), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_bases_keep_float32_adapters_as_peft_does(tmp_path: Path) -> None:
    model, input_ids = tiny_llama().to(torch.bfloat16).eval(), some_ids(2, 6)
    spec = AdapterSpec(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS)
    folder = filled(model, spec, tmp_path / "a", seed=2)
    peft = PeftModel.from_pretrained(copy_of(model).to(torch.bfloat16), str(folder))
    bank = AdapterBank(model, num_slots=2, max_r=4, target_modules=LLAMA_TARGETS)
    bank.load_slot(0, folder)
    bank.load_slot(1, folder)
    with torch.no_grad():
        expected = logits(peft, input_ids)
        with bank.rows([0, 1]):
            rows = logits(model, input_ids)
        with bank.tokens(torch.tensor([0, 1] * 6)):
            tokens = logits(model, input_ids)
    # 8 bits of mantissa, values near 1
    torch.testing.assert_close(rows, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(tokens, expected, rtol=0.02, atol=0.02)
