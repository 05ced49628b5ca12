import json
from pathlib import Path

import pytest

from cluster.catalog import all_models, find
from cluster.catalog_rows import ROWS
from cluster.catalog_toml import NUMBERS, BrokenModelsFile

WHOLE = """
[models.my-llama]
model_id = "me/my-llama"
revision = "v2"
licence = "MIT"
architecture = "LlamaForCausalLM"
vocab_size = 32000
hidden_size = 4096
intermediate_size = 11008
num_hidden_layers = 32
num_attention_heads = 32
num_key_value_heads = 32
head_dim = 128
max_position_embeddings = 4096
tie_word_embeddings = false
stop_token_ids = [2]
notes_ja = ["自作"]
tokenizer_kwargs = { use_fast = false }
"""
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": [1, 2],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path))
    return tmp_path


def write(home: Path, text: str) -> None:
    (home / "models.toml").write_text(text, encoding="utf-8")


def test_an_entry_with_all_numbers_is_a_model_without_the_hub(home: Path) -> None:
    write(home, WHOLE)
    card = find("my-llama")
    assert card.num_parameters() == 6_738_415_616  # the numbers of ELYZA's Llama 2 7B
    assert (card.revision, card.stop_token_ids, card.notes_ja) == ("v2", (2,), ("自作",))
    assert card.tokenizer_kwargs == (("use_fast", False),)
    assert card.source.endswith("models.toml")
    assert all_models() == (*ROWS, card)


def test_an_entry_takes_its_numbers_from_the_folder_it_names(home: Path) -> None:
    folder = home / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    write(home, f'[models.tiny]\nmodel_id = "{folder}"\nlicence = "CC0"\n')
    card = find("tiny")
    assert (card.hidden_size, card.head_dim, card.licence, card.stop_token_ids) == (64, 16, "CC0", (1, 2))


def test_a_missing_field_is_named_with_file_and_entry(home: Path) -> None:
    write(home, '[models.tiny]\nlicence = "MIT"\n')
    with pytest.raises(BrokenModelsFile, match=r"models\.toml: entry 'tiny', field 'model_id': Field required"):
        find("tiny")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_neither_the_entry_nor_its_folder_gives_is_named(home: Path, number: str) -> None:
    lines = [line for line in WHOLE.splitlines() if not line.startswith(number)]
    (home / "empty").mkdir()
    write(home, "\n".join(lines).replace("me/my-llama", str(home / "empty")))
    with pytest.raises(BrokenModelsFile, match=rf"entry 'my-llama' does not give {number}, and: .*no config\.json"):
        find("my-llama")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models.x\n", "is not TOML"),
        ('[models.x]\nmodel_id = "a/b"\nhiden_size = 4\n', "entry 'x', field 'hiden_size': Extra inputs"),
        (
            '[models.x]\nmodel_id = "a/b"\nhidden_size = "4"\n',
            "entry 'x', field 'hidden_size': Input should be a valid int",
        ),
        ('[models.x]\nmodel_id = "a/b"\nhidden_size = 0\n', "entry 'x', field 'hidden_size': Input should be greater"),
        ('[model.x]\nmodel_id = "a/b"\n', "'model'"),
        ('[models."a:b"]\nmodel_id = "a/b"\n', "mean something else"),
        ('[models.calm3-22b-chat]\nmodel_id = "a/b"\n', "is in the catalog already"),
    ],
)
def test_a_broken_file_is_one_line_that_says_where(home: Path, text: str, message: str) -> None:
    write(home, text)
    with pytest.raises(BrokenModelsFile, match=message) as caught:
        all_models()
    assert "\n" not in str(caught.value)
    assert "models.toml" in str(caught.value)


def test_an_architecture_that_is_not_known_is_named(home: Path) -> None:
    write(home, WHOLE.replace("LlamaForCausalLM", "MambaForCausalLM"))
    with pytest.raises(BrokenModelsFile, match=r"field 'architecture': MambaForCausalLM cannot be planned"):
        find("my-llama")


def test_catalog_names_are_found_although_the_users_file_is_broken(home: Path) -> None:
    write(home, "[[[")
    assert find("calm3-22b-chat").name == "calm3-22b-chat"
