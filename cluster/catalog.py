"""The catalog: the models Kajiya knows by name, the user's own, and whatever a hub id or a folder says of itself."""

import difflib
import re
from dataclasses import replace
from pathlib import Path

from cluster import config_json
from cluster.catalog_rows import ROWS
from cluster.errors import UserError
from cluster.home import kajiya_home
from cluster.model_card import ModelCard

MODELS_FILE = "models.toml"


class UnknownModel(UserError, LookupError):
    """No model of that name; the text offers the nearest names."""


def all_models() -> tuple[ModelCard, ...]:
    """Return the catalog's rows, then the user's: entries of `models.toml` under `KAJIYA_HOME`, and trained models.

    Raises:
        BrokenModelsFile: the user's file cannot be read; file, entry and field are named.
    """
    trained = (_trained_model(name, folder) for name, folder in trained_folders().items())
    return (*ROWS, *(_user_model(name) for name in _user_names()), *trained)


def trained_folders() -> dict[str, Path]:
    """Return the folders of the models that full fine-tuning has written, by name: MODEL-NAME-v1."""
    manifests = (kajiya_home() / "models" / "trained").glob("*/*/v*/manifest.json")
    return {"-".join(file.parts[-4:-1]): file.parent for file in sorted(manifests)}


def find(name: str) -> ModelCard:
    """Return the card of a catalog name (any case), a user's entry, a trained model, a hub id or a local folder.

    A hub id of the catalog is its row; another's `config.json` is read from the hub's cache or the hub.

    Raises:
        UnknownModel: nothing is called so; the nearest names are offered.
        UnreadableConfig, HubUnreachable: it is a folder or a hub id, and its `config.json` cannot be read.
        BrokenModelsFile: it is not in the catalog, and the user's file cannot be read.
    """
    for card in ROWS:
        if name.lower() in (card.name, card.model_id.lower(), *(alias.lower() for alias in card.aliases)):
            return card
    names = _user_names()
    if name in names:
        return _user_model(name)
    trained = trained_folders()
    if name in trained:
        return _trained_model(name, trained[name])
    if Path(name).expanduser().is_dir():
        return _folder_model(Path(name).expanduser())
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return ModelCard(
            name=_short(name), model_id=name, source="config.json on the hub", **config_json.read_hub(name)
        )
    raise UnknownModel(_unknown(name, [*(card.name for card in ROWS), *names, *trained]))


def _unknown(name: str, names: list[str]) -> str:
    if name.startswith(("/", "./", "../", "~")):
        return f"There is no folder {name}."
    lowered = name.lower()
    near = difflib.get_close_matches(lowered, names, n=3, cutoff=0.4)
    near += [known for known in names if lowered and lowered in known.lower() and known not in near]
    offer = f"near it: {', '.join(near[:3])}" if near else f"known: {', '.join(names)}"
    return f"No model is called {name!r}; {offer}. A hub id (org/name) or a model folder works too."


def _folder_model(folder: Path) -> ModelCard:
    facts = config_json.read_folder(folder)
    path = folder.resolve()
    return ModelCard(name=_short(path.name), model_id=str(path), source=str(path / "config.json"), **facts)


def _trained_model(name: str, folder: Path) -> ModelCard:
    return replace(_folder_model(folder), name=name)


def _short(name: str) -> str:
    """Return a name without the characters that mean something else in `model:adapter@version`."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.rpartition("/")[2].lower())


def _user_names() -> list[str]:
    path = kajiya_home() / MODELS_FILE
    if not path.is_file():
        return []
    from cluster import catalog_toml  # pydantic takes a third of the time of a plan: only where there is a file

    names = list(catalog_toml.read_entries(path))
    taken = sorted({card.name for card in ROWS} & set(names))
    if taken:
        raise catalog_toml.BrokenModelsFile(f"{path}: {', '.join(taken)} is in the catalog already; take another name.")
    return names


def _user_model(name: str) -> ModelCard:
    from cluster import catalog_toml

    path = kajiya_home() / MODELS_FILE
    return catalog_toml.card(name, catalog_toml.read_entries(path)[name], path)
