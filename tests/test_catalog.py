from pathlib import Path

import pytest

from cluster.catalog import UnknownModel, all_models, find
from cluster.catalog_rows import ROWS
from cluster.errors import UserError

SPECIFICATION = {
    # hub id: (labels of VRAM in GB, quantization of the model's own, required?)
    "Qwen/Qwen2.5-14B-Instruct": ({"float16": 28, "8bit": 14, "4bit": 7}, "int8", False),
    "Qwen/Qwen2.5-32B-Instruct": ({"float16": 64, "8bit": 32, "4bit": 16}, "nf4", True),
    "cyberagent/calm3-22b-chat": ({"float16": 44, "8bit": 22, "4bit": 11}, "nf4", False),
    "cyberagent/DeepSeek-R1-Distill-Qwen-32B-Japanese": ({"float16": 64, "8bit": 32}, "int8", False),
    "elyza/ELYZA-japanese-Llama-2-7b-instruct": ({"float16": 14, "8bit": 7}, None, False),
    "rinna/japanese-gpt2-small": ({"": 1}, None, False),
    "stabilityai/japanese-stablelm-3b-4e1t-instruct": ({"float16": 6, "8bit": 3}, None, False),
    "meta-llama/Meta-Llama-3.1-70B-Instruct": ({"float16": 140, "4bit": 35}, "nf4", True),
    "microsoft/Phi-3.5-MoE-instruct": ({"float16": 32, "8bit": 16}, None, False),
}
NOTES = {
    "qwen2.5-14b-instruct": ("推奨用途: 汎用対話、コード生成、翻訳", "量子化: 8bit推奨"),
    "qwen2.5-32b-instruct": ("推奨用途: 高度な推論、長文生成", "量子化: 4bit必須"),
    "calm3-22b-chat": ("特徴: 日本語に最適化、高品質な対話生成", "量子化: 4bit推奨"),
    "deepseek-r1-distill-qwen-32b-japanese": ("特徴: DeepSeekの推論能力を日本語に蒸留", "量子化: 8bit推奨"),
    "elyza-japanese-llama-2-7b-instruct": ("特徴: Llama2ベース、日本語特化",),
    "japanese-gpt2-small": ("用途: テスト、軽量処理",),
    "japanese-stablelm-3b-4e1t-instruct": ("特徴: 効率的な小規模モデル",),
    "llama-3.1-70b-instruct": ("量子化: 4bit必須", "CPUオフロード: 必須"),
    "phi-3.5-moe-instruct": ("特徴: MoE アーキテクチャ、効率的",),
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path))
    return tmp_path


def test_the_catalog_holds_the_nine_models_of_the_specification_and_the_embedded_one() -> None:
    assert [card.model_id for card in ROWS] == ["embedded:smollm2", *SPECIFICATION]
    for card in ROWS[1:]:
        labels, precision, is_required = SPECIFICATION[card.model_id]
        assert dict(card.spec_vram_gb) == labels
        assert card.recommended_precision == precision
        assert card.is_quantization_required == is_required
        assert card.notes_ja == NOTES[card.name]


def test_only_llama_70b_must_offload() -> None:
    assert [card.name for card in ROWS if card.is_cpu_offload_required] == ["llama-3.1-70b-instruct"]


def test_every_row_has_a_source_a_licence_stop_tokens_and_a_name_that_means_nothing_else() -> None:
    assert ROWS
    for card in ROWS:
        assert card.source
        assert card.licence != "unknown"
        assert card.stop_token_ids
        assert not set(card.name) & set(":@/ ")
        assert card.name == card.name.lower()


def test_stop_tokens_are_those_of_the_fact_sheet() -> None:
    stops = {card.name: card.stop_token_ids for card in ROWS}
    assert stops["qwen2.5-14b-instruct"] == (151645, 151643)
    assert stops["calm3-22b-chat"] == (65001,)
    assert stops["deepseek-r1-distill-qwen-32b-japanese"] == (151643,)
    assert stops["llama-3.1-70b-instruct"] == (128001, 128008, 128009)
    assert stops["phi-3.5-moe-instruct"] == (32000, 32001, 32007)
    assert stops["japanese-stablelm-3b-4e1t-instruct"] == (0,)


def test_the_rinna_tokenizer_gets_the_arguments_that_it_needs() -> None:
    assert dict(find("japanese-gpt2-small").tokenizer_kwargs) == {"use_fast": False, "do_lower_case": True}


def test_the_remote_code_of_stablelm_is_mapped_and_not_run() -> None:
    card = find("japanese-stablelm-3b-4e1t-instruct")
    assert (card.model_type, card.trust_remote_code) == ("stablelm", False)
    assert dict(card.config_mapping) == {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
    assert not card.is_vllm_servable  # vLLM dropped StableLMEpochForCausalLM in 0.28


def test_names_are_found_in_any_case() -> None:
    assert find("CALM3-22b-Chat") is find("calm3-22b-chat")


@pytest.mark.parametrize("name", ["meta-llama/Meta-Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"])
def test_both_hub_names_of_llama_lead_to_its_row(name: str) -> None:
    assert find(name).name == "llama-3.1-70b-instruct"


def test_the_hub_id_of_the_embedded_model_leads_to_the_embedded_one() -> None:
    assert find("HuggingFaceTB/SmolLM2-135M-Instruct").model_id == "embedded:smollm2"


@pytest.mark.parametrize(
    ("typed", "meant"), [("qwen2.5-14b", "qwen2.5-14b-instruct"), ("calm3", "calm3-22b-chat"), ("phi", "phi-3.5-moe-")]
)
def test_an_unknown_model_offers_the_nearest_names(typed: str, meant: str) -> None:
    with pytest.raises(UnknownModel, match=meant) as caught:
        find(typed)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, LookupError)
    assert "\n" not in str(caught.value)


def test_a_name_like_nothing_gets_the_whole_list() -> None:
    with pytest.raises(UnknownModel, match=r"known: smollm2-135m-instruct, .*phi-3\.5-moe-instruct"):
        find("zzzz")


def test_a_folder_that_is_not_there_is_called_a_folder() -> None:
    with pytest.raises(UnknownModel, match=r"There is no folder \./nowhere"):
        find("./nowhere")


def test_without_a_file_of_the_users_the_catalog_is_all() -> None:
    assert all_models() == ROWS
