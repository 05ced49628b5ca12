"""What a bank cannot hold, and folders that are no adapters."""

import json
from pathlib import Path

import pytest
import torch
from banked import ATTENTION, filled, tiny_llama
from safetensors.torch import load, save_file

from cluster.errors import UserError
from cluster.models.adapter_spec import AdapterSpec
from cluster.models.bank import AdapterBank


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def broken(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"layers_to_transform": [1]}, "layers_to_transform"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"peft_type": "IA3"}, "peft_type"),
    ({"something_of_next_year": 1}, "something_of_next_year"),
    ({"target_modules": "all-linear"}, "target_modules"),
    ({"r": 16}, "r is 16; this bank holds ranks up to 4"),
    ({"r": 3}, r"is \(2, 32\), not \(3, 32\)"),
    ({"target_modules": ["q_proj", "gate_proj"]}, "gate_proj; this bank adapts k_proj, o_proj, q_proj, v_proj"),
    ({"target_modules": ["q_proj"]}, "belongs to no target module"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_the_bank_cannot_hold_is_refused_by_name(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    model = tiny_llama()
    folder = filled(model, AdapterSpec(r=2, lora_alpha=4, target_modules=ATTENTION), tmp_path / "a", seed=0)
    bank = AdapterBank(model, num_slots=1, max_r=4, target_modules=ATTENTION)
    before = bank.load_slot(0, folder)
    weight = next(bank.parameters()).clone()
    broken(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        bank.load_slot(0, folder)
    assert "\n" not in str(caught.value)
    assert bank.specs == (before,)
    assert torch.equal(weight, next(bank.parameters()))


def test_broken_adapter_folders_are_one_line_errors(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = filled(model, AdapterSpec(r=2, lora_alpha=4, target_modules=ATTENTION), tmp_path / "a", seed=0)
    bank = AdapterBank(model, num_slots=1, max_r=4, target_modules=ATTENTION)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    tensors = load(content)

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            bank.load_slot(0, folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    weights.write_bytes(content[: len(content) // 2])
    assert "broken one" in refused()
    weights.unlink()
    assert "cannot read it" in refused()
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, weights)
    assert "tensor base_model.model.lm_head.weight" in refused()
    name, _ = tensors.popitem()
    save_file(tensors, weights)
    assert f"{name.removeprefix('base_model.model.')} is missing" in refused()
    (folder / "adapter_config.json").write_text("{")
    assert "file: Invalid JSON" in refused()
    (folder / "adapter_config.json").unlink()
    assert "is" in refused()
    assert bank.specs == (None,)


def test_scattered_rows_empty_slots_and_unknown_targets_are_refused() -> None:
    with pytest.raises(LookupError, match=r"no linear layer is called c_attn; .*q_proj"):
        AdapterBank(tiny_llama(), num_slots=1, max_r=2, target_modules=("c_attn",))
    bank = AdapterBank(tiny_llama(), num_slots=3, max_r=2, target_modules=("q_proj",))
    spec = AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj",))
    bank.init_slot(0, spec, seed=0)
    bank.init_slot(1, spec, seed=0)
    for rows in ([0, 0, 1, 0], [0, 1, 0, 1], [2], [3], []):
        with pytest.raises(ValueError, match=r"in contiguous blocks|holds no adapter"), bank.rows(rows):
            pass
    with pytest.raises(ValueError, match="holds no adapter"), bank.tokens(torch.tensor([0, 2])):
        pass
