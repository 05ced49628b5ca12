"""Linear layers with repacked weights: the same numbers, in another order of memory."""

import pytest
import torch
from tiny_models import tiny_llama_folder
from torch import nn
from transformers import AutoModelForCausalLM

from cluster.catalog import find
from cluster.models.adapter_spec import AdapterSpec
from cluster.models.bank import AdapterBank
from cluster.models.base import load_base
from serve_apps.packed_linear import JoinedLinears, LinearPart, PackedLinear, pack_linears


@pytest.mark.parametrize("num_rows", [1, 7, 16, 300])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_layer_computes_what_the_layer_computes(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(576, 192, bias=has_bias)
    x = torch.randn(1, num_rows, 576)
    with torch.no_grad():
        assert torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-5)


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
@torch.no_grad()
def test_joined_layers_compute_what_each_computes_and_add_what_they_are_given(biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(64, size, bias=bias) for size, bias in zip((48, 16), biases, strict=True)]
    joined, x, residual = JoinedLinears(linears), torch.randn(5, 64), torch.randn(5, 64)
    expected = torch.cat([linear(x) for linear in linears], dim=-1)
    assert torch.allclose(joined(x), expected, atol=1e-5)
    assert torch.allclose(joined(x, residual=residual), expected + residual, atol=1e-5)


def test_a_layer_whose_weights_moved_refuses_to_compute() -> None:
    part = LinearPart(nn.Linear(8, 4))
    assert (part.in_features, part.out_features, part.weight.dtype) == (8, 4, torch.float32)
    with pytest.raises(RuntimeError, match="joined"):
        part(torch.randn(1, 8))


def test_every_linear_of_a_model_is_packed_and_its_logits_stay(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        num_linears = sum(isinstance(module, nn.Linear) for module in model.modules())
        assert pack_linears(model) == num_linears
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert pack_linears(model) == 0


def test_adapters_go_through_a_packed_base(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")
    ids, slots = torch.arange(12)[None], torch.tensor([0] * 5 + [-1] * 7)
    logits = []
    for is_packed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if is_packed:
            pack_linears(model)
        bank = AdapterBank(model, num_slots=1, max_r=4, target_modules=["q_proj", "down_proj"])
        bank.init_slot(0, AdapterSpec(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj")), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            with bank.tokens(slots):
                logits.append(model(ids).logits)
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_quantized_layers_stay(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")
    model = load_base(find(str(folder)), precision="nf4").model
    assert pack_linears(model) == 1  # the head, which bitsandbytes leaves alone
