"""Adapters that replicas keep in memory: a pin is part of what a name means, and follows it to the next version."""

from cluster.alias import Alias
from cluster.errors import UserError
from cluster.registry import Registry


class TooManyPins(UserError, ValueError):
    """One more pinned adapter would leave no room for those that are not."""


def pin(registry: Registry, model: str, name: str, *, max_loras: int) -> Alias:
    """Keep the current version of `model:name` in the memory of replicas, which hold `max_loras` adapters at a time.

    Raises:
        UnknownAdapter: no such adapter.
        TooManyPins: with this one, no place is left for all adapters that are not pinned.
    """
    registry.resolve(model, name)
    others = [n for n in registry.names(model) if n != name and registry.alias(model, n).is_pinned]
    if len(others) + 1 >= max_loras:
        raise TooManyPins(
            f"{model} holds {max_loras} adapters at a time, one place has to stay free, and {len(others)} are pinned "
            f"({', '.join(others) or 'none'}); unpin one, or serve it with a larger num_adapters."
        )
    return registry.point(model, name, registry.alias(model, name).pinned(is_pinned=True))


def unpin(registry: Registry, model: str, name: str) -> Alias:
    """Let `model:name` make room for others again."""
    registry.resolve(model, name)
    return registry.point(model, name, registry.alias(model, name).pinned(is_pinned=False))
