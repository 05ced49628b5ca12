"""The user's own models: `models.toml` under `KAJIYA_HOME`.

    [models.my-model]
    model_id = "org/name"          # or a folder
    licence = "MIT"
    stop_token_ids = [2]

An entry needs a `model_id`. Numbers that it does not give are read from the model's `config.json`.
"""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import config_json
from cluster.architectures import ARCHITECTURES, canonical_name
from cluster.errors import UserError
from cluster.model_card import ModelCard, Precision


class BrokenModelsFile(UserError, ValueError):
    """A `models.toml` that cannot be read; the text names file, entry and field."""


class Entry(BaseModel):
    """One `[models.NAME]` table; the names are those of `ModelCard`."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model_id: str = Field(min_length=1)
    revision: str | None = None
    licence: str | None = None
    is_gated: bool | None = None
    trust_remote_code: bool | None = None
    tokenizer_kwargs: dict[str, bool] | None = None
    chat_template: str | None = None
    stop_token_ids: list[int] | None = None
    languages: list[str] | None = None
    notes_ja: list[str] | None = None
    recommended_precision: Precision | None = None
    is_gguf_convertible: bool | None = None

    architecture: str | None = None
    vocab_size: int | None = Field(None, gt=0)
    hidden_size: int | None = Field(None, gt=0)
    intermediate_size: int | None = Field(None, gt=0)
    num_hidden_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    max_position_embeddings: int | None = Field(None, gt=0)
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    attention_output_bias: bool | None = None
    mlp_bias: bool | None = None
    lm_head_bias: bool | None = None
    num_local_experts: int | None = Field(None, ge=0)
    num_experts_per_tok: int | None = Field(None, ge=0)


NUMBERS = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)
"""An entry with all of these needs no `config.json`."""


class File(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, Entry] = {}


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the entries of a `models.toml` by name; none if there is no such file.

    Raises:
        BrokenModelsFile: not TOML, a field that is missing, unknown or of the wrong kind, or a name that cannot be one.
    """
    if not path.is_file():
        return {}
    try:
        entries = File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).models
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BrokenModelsFile(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        problems = [f"{_where(problem['loc'])}: {problem['msg']}" for problem in error.errors()]
        raise BrokenModelsFile(f"{path}: {'; '.join(problems)}.") from error
    bad = [name for name in entries if not name or set(name) & set(":@/ ")]
    if bad:
        raise BrokenModelsFile(f"{path}: the names {bad} hold ':', '@', '/' or a space, which mean something else.")
    return entries


def _where(location: tuple[int | str, ...]) -> str:
    """Return `entry 'NAME', field 'FIELD'` for a place in the file."""
    _, *rest = location
    if not rest:
        return f"{location[0]!r}"
    return f"entry {rest[0]!r}" + (f", field {'.'.join(map(str, rest[1:]))!r}" if rest[1:] else "")


def card(name: str, entry: Entry, path: Path) -> ModelCard:
    """Return an entry as a card, filled up from the model's `config.json` where it does not give all numbers.

    Raises:
        BrokenModelsFile: an architecture that is not known.
        UnreadableConfig, HubUnreachable: numbers are missing, and the model's own file does not give them.
    """
    given: dict[str, Any] = entry.model_dump(exclude_none=True)
    if entry.architecture is not None:
        known = canonical_name(entry.architecture)
        if known is None:
            raise BrokenModelsFile(
                f"{path}: entry {name!r}, field 'architecture': {entry.architecture} cannot be planned; "
                f"known are {', '.join(ARCHITECTURES)}."
            )
        given["architecture"] = known
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if "tokenizer_kwargs" in given:
        given["tokenizer_kwargs"] = tuple(given["tokenizer_kwargs"].items())
    missing = [number for number in NUMBERS if number not in given]
    try:
        facts = _own_facts(entry) if missing else {}
    except UserError as error:
        wanted = ", ".join(missing)
        raise BrokenModelsFile(f"{path}: entry {name!r} does not give {wanted}, and: {error}") from error
    return ModelCard(**{**facts, **given, "name": name, "source": str(path)})


def _own_facts(entry: Entry) -> dict[str, Any]:
    folder = Path(entry.model_id).expanduser()
    return config_json.read_folder(folder) if folder.is_dir() else config_json.read_hub(entry.model_id, entry.revision)
