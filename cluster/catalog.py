"""The catalog: the models Kajiya knows by name, the user's own, and whatever a hub id or a folder says of itself."""

from cluster.errors import UserError
from cluster.model_card import ModelCard


class UnknownModel(UserError, LookupError):
    """No model of that name; the text offers the nearest names."""


def all_models() -> tuple[ModelCard, ...]:
    """Return the catalog's rows, then the user's entries of `models.toml` under `KAJIYA_HOME`."""
    raise NotImplementedError


def find(name: str) -> ModelCard:
    """Return the card of a catalog name, a user's entry, a hub id `org/name` or a local folder.

    Raises:
        UnknownModel: nothing is called so; the nearest names are offered.
    """
    raise NotImplementedError
