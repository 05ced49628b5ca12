"""Serving: adapters by token in one pass, against PEFT itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from banked import ATTENTION, FAMILIES, LLAMA_TARGETS, copy_of, filled, logits, some_ids, tiny_llama
from peft import PeftModel
from transformers import (
    PreTrainedModel,
)

from cluster.models.adapter_spec import AdapterSpec
from cluster.models.bank import AdapterBank
from cluster.models.routing import route_tokens


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_tokens", [12, 400], ids=["dense", "segments"])
@pytest.mark.parametrize(("make", "targets"), FAMILIES)
def test_tokens_of_mixed_adapters_equal_peft_and_the_bare_base_is_bit_equal(
    make: Callable[[], PreTrainedModel], targets: tuple[str, ...], num_tokens: int, tmp_path: Path
) -> None:
    model = make().eval()
    base = copy_of(model)
    specs = [
        AdapterSpec(r=2, lora_alpha=8, target_modules=targets),
        AdapterSpec(r=5, lora_alpha=5, target_modules=targets[:1]),
    ]
    folders = [filled(model, spec, tmp_path / str(k), seed=k) for k, spec in enumerate(specs)]
    bank = AdapterBank(model, num_slots=4, max_r=8, target_modules=targets)
    bank.load_slot(0, folders[0])
    bank.load_slot(3, folders[1])
    # One layer at a time: attention would mix tokens, which continuous batching keeps apart and this test does not.
    name = next(name for name in bank.layers if name.endswith(targets[0]))
    layer = bank.layers[name]
    x = torch.randn(1, num_tokens, layer.lora_A.shape[2])
    slot_of_token = torch.tensor([(-1, 0, 3, 3)[i * 4 // num_tokens] for i in range(num_tokens)])
    slot_of_token[num_tokens // 2 :: 3] = 0  # now the tokens of slot 3 are scattered
    with bank.tokens(slot_of_token):
        mixed = layer(x)
    with torch.no_grad():
        expected = {-1: base.get_submodule(name)(x)}
        for slot, folder in ((0, folders[0]), (3, folders[1])):
            peft = PeftModel.from_pretrained(copy_of(base), str(folder))
            expected[slot] = peft.base_model.model.get_submodule(name)(x)
    for slot in (-1, 0, 3):
        mine = slot_of_token == slot
        torch.testing.assert_close(mixed[:, mine], expected[slot][:, mine], rtol=1e-5, atol=1e-5)
    bare = slot_of_token == -1
    assert bare.any()
    assert torch.equal(mixed[:, bare], expected[-1][:, bare])
    with bank.tokens(torch.full((num_tokens,), -1)):
        assert torch.equal(layer(x), expected[-1])
    assert torch.equal(layer(x), expected[-1])


def test_long_passes_of_mixed_adapters_have_a_product_each_and_short_ones_one_together() -> None:
    specs = [AdapterSpec(r=8, lora_alpha=8, target_modules=("q_proj",))] * 2
    versions = {0: 0, 1: 0}
    for num_tokens, is_dense in ((128, True), (129, False)):  # 1024 tokens x mean rank
        slots = torch.tensor([0] * 100 + [1] * (num_tokens - 100))
        routed = route_tokens(slots, specs, versions=versions, like=torch.empty(0))
        assert (routed.mask is not None, len(routed.segments)) == (is_dense, 0 if is_dense else 2)


def test_tokens_of_one_adapter_give_pefts_logits_for_a_whole_prompt(tmp_path: Path) -> None:
    model, input_ids = tiny_llama().eval(), some_ids(1, 80)
    spec = AdapterSpec(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS)
    folder = filled(model, spec, tmp_path / "a", seed=5)
    peft = PeftModel.from_pretrained(copy_of(model), str(folder))
    bank = AdapterBank(model, num_slots=3, max_r=8, target_modules=LLAMA_TARGETS)
    bank.load_slot(2, folder)
    with bank.tokens(torch.full((80,), 2)):
        ours = logits(model, input_ids)
    with torch.no_grad():
        assert (ours - logits(peft, input_ids)).abs().max() <= 1e-4


def test_a_slot_loaded_anew_is_used_at_once(tmp_path: Path) -> None:
    model, input_ids = tiny_llama().eval(), some_ids(1, 6)
    spec = AdapterSpec(r=2, lora_alpha=8, target_modules=ATTENTION)
    old, new = (filled(model, spec, tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    bank = AdapterBank(model, num_slots=1, max_r=2, target_modules=ATTENTION)
    seen = []
    for folder in (old, new, old):
        bank.load_slot(0, folder)
        with bank.tokens(torch.zeros(6, dtype=torch.long)):
            seen.append(logits(model, input_ids))
    assert torch.equal(seen[0], seen[2])
    assert (seen[0] - seen[1]).abs().max() > 1e-3
