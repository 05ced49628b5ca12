"""Try a version on a part of the users before everybody gets it."""

from cluster.alias import Alias, Canary
from cluster.errors import UserError
from cluster.registry import Registry


class NothingToTry(UserError, ValueError):
    """The candidate is what everybody gets already."""


def start_canary(registry: Registry, model: str, name: str, canary: Canary) -> Alias:
    """Let `canary.percent` of the users of `model:name` get `canary.version` until it is promoted or rolled back.

    Raises:
        UnknownAdapter: no such adapter or version.
        NothingToTry: the name means that version.
    """
    registry.resolve(model, f"{name}@{canary.version}")
    alias = registry.alias(model, name)
    if alias.version == canary.version:
        raise NothingToTry(f"{model}:{name} means version {canary.version} for everybody; try another one.")
    return registry.point(model, name, alias.trying(canary))
