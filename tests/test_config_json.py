import json
from pathlib import Path
from typing import Any

import pytest

from cluster.catalog import find
from cluster.catalog_rows import ROWS
from cluster.config_json import HubUnreachable, UnreadableConfig, card_facts, read_hub

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "eos_token_id": [128001, 128008, 128009],
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 32000,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "eos_token_id": 2,
}
STABLELM_EPOCH = {
    "architectures": ["StableLMEpochForCausalLM"],
    "model_type": "stablelm_epoch",
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-05,
    "rope_pct": 0.25,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
PHI_MOE = {
    "architectures": ["PhiMoEForCausalLM"],
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "lm_head_bias": True,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "eos_token_id": 32000,
}


def folder_with(tmp_path: Path, config: object) -> Path:
    folder = tmp_path / "My_Model"
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "llama-3.1-70b-instruct"),
        (GPT2, "japanese-gpt2-small"),
        (STABLELM_EPOCH, "japanese-stablelm-3b-4e1t-instruct"),
        (PHI_MOE, "phi-3.5-moe-instruct"),
    ],
)
def test_a_published_file_gives_the_numbers_of_the_catalogs_row(config: dict[str, Any], name: str) -> None:
    row = next(card for card in ROWS if card.name == name)
    facts = card_facts(config, origin="config.json")
    same = [key for key in facts if key not in ("stop_token_ids", "has_tokenizer_chat_template")]
    assert {key: facts[key] for key in same} == {key: getattr(row, key) for key in same}


def test_a_local_folder_is_a_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA)
    card = find(str(folder))
    assert (card.name, card.model_id) == ("my_model", str(folder))
    assert card.num_parameters() == 70_553_706_496
    assert card.stop_token_ids == (128001, 128008, 128009)
    assert not card.has_tokenizer_chat_template


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_folder_with_a_chat_template_can_chat(tmp_path: Path, where: str) -> None:
    folder = folder_with(tmp_path, LLAMA)
    (folder / where).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert find(str(folder)).has_tokenizer_chat_template


@pytest.mark.parametrize("key", [k for k in LLAMA if k not in ("architectures", "num_key_value_heads", "eos_token_id")])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != key}
    if key == "tie_word_embeddings":
        assert card_facts(config, origin="x")["tie_word_embeddings"] is False  # the class's own default
        return
    with pytest.raises(UnreadableConfig, match=rf"config\.json misses {key}\.$"):
        find(str(folder_with(tmp_path, config)))


def test_all_problems_come_at_once() -> None:
    config = {**LLAMA, "vocab_size": None, "hidden_size": "8192", "num_hidden_layers": 0}
    with pytest.raises(
        UnreadableConfig, match=r"misses vocab_size and needs positive .* hidden_size='8192', num_hidden_l"
    ):
        card_facts(config, origin="x")


def test_gpt2s_keys_are_named_in_its_own_spelling() -> None:
    with pytest.raises(UnreadableConfig, match=r"misses n_layer\.$"):
        card_facts({k: v for k, v in GPT2.items() if k != "n_layer"}, origin="x")


def test_experts_without_their_number_are_named() -> None:
    with pytest.raises(UnreadableConfig, match="misses num_local_experts"):
        card_facts({k: v for k, v in PHI_MOE.items() if k != "num_local_experts"}, origin="x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "the architecture \\(none\\) cannot be planned"),
        ({**LLAMA, "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM cannot be planned; known are Llama"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(UnreadableConfig, match=message):
        find(str(folder_with(tmp_path, config)))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableConfig, match=r"has no config\.json"):
        find(str(tmp_path))


def test_a_quantized_checkpoint_says_so() -> None:
    gptq = card_facts({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, origin="x")
    assert (gptq["checkpoint_quantization"], gptq["checkpoint_bits"]) == ("gptq", 4)
    bnb = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert card_facts({**LLAMA, "quantization_config": bnb}, origin="x")["checkpoint_bits"] == 8


def cached_repository(cache: Path) -> None:
    """The layout of the hub's cache, with one commit of `me/cached`."""
    repository = cache / "models--me--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))


def test_a_cached_hub_id_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached_repository(tmp_path)
    assert read_hub("me/cached")["hidden_size"] == 8192
    assert find("me/Cached".lower()).model_id == "me/cached"


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match=r"me/other is not cached and the hub does not give it") as caught:
        read_hub("me/other")
    assert isinstance(caught.value, ConnectionError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "words"), [("gated", "is gated: accept its terms"), ("unknown", "shows no model")])
def test_gated_and_unknown_repositories_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, status: str, words: str
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def refuse(*_: object, **__: object) -> None:
        kind = GatedRepoError if status == "gated" else RepositoryNotFoundError
        error = kind.__new__(kind)
        Exception.__init__(error, "refused")
        raise error

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(HubUnreachable, match=words):
        read_hub("me/secret")
