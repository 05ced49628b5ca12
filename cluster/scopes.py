"""What a key may use: patterns over the names of base models and of adapters."""

import re
from collections.abc import Iterable
from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from cluster.errors import UserError

KINDS = ("models", "adapters")


class BadScope(UserError, ValueError):
    """A scope that means nothing."""


class Scopes(BaseModel):
    """Patterns, in which `*` stands for any run of characters except `:` and `@`, so that it never leaves its part.

    Each grants what it names and nothing beside: the base of an adapter needs a pattern of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = ("*",)
    """Bare base models, such as `smollm2-135m-instruct`."""
    adapters: tuple[str, ...] = ("*:*",)
    """`model:adapter` for all of its versions and whatever is promoted, `model:adapter@3` for that version alone."""

    def allow_model(self, base: str) -> bool:
        """Return whether the bare base model may be used."""
        return any(_compiled(pattern).fullmatch(base) for pattern in self.models)

    def allow_adapter(self, base: str, name: str, version: int) -> bool:
        """Return whether version `version` of the adapter may be used."""
        plain = f"{base}:{name}"
        exact = f"{plain}@{version}"
        return any(_compiled(pattern).fullmatch(exact if "@" in pattern else plain) for pattern in self.adapters)

    def may_know(self, base: str, name: str = "") -> bool:
        """Return whether some version of the adapter, or something of the base if there is no `name`, may be used.

        What a key may not use, it is not told about either.
        """
        wanted = f"{base}:{name}" if name else base
        parts = (pattern.partition("@")[0] for pattern in self.adapters)
        if not name:
            parts = (part.partition(":")[0] for part in parts)
        return any(_compiled(part).fullmatch(wanted) for part in parts) or (not name and self.allow_model(base))


def parse_scopes(words: Iterable[str]) -> Scopes:
    """Return the scopes of `models:NAME,NAME` and `adapters:MODEL:NAME,MODEL:NAME@3`; everything where none is given.

    Raises:
        BadScope: a word is not of this form.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for word in words:
        kind, _, patterns = word.partition(":")
        if kind not in KINDS or not patterns:
            raise BadScope(f"{word!r} is no scope; write models:NAME or adapters:MODEL:NAME, with * for any.")
        for pattern in patterns.split(","):
            found[kind].append(_checked(kind, pattern.strip(), word))
    return Scopes(models=tuple(found["models"]), adapters=tuple(found["adapters"])) if any(found.values()) else Scopes()


def _checked(kind: str, pattern: str, word: str) -> str:
    full = "*:*" if (kind, pattern) == ("adapters", "*") else pattern
    base, colon, name = full.partition(":")
    is_whole = bool(base) and (bool(name) if kind == "adapters" else not colon and "@" not in full)
    if not is_whole or ":" in name:
        form = "models:NAME" if kind == "models" else "adapters:MODEL:NAME or adapters:MODEL:NAME@VERSION"
        raise BadScope(f"{pattern!r} in the scope {word!r} names nothing; write {form}, with * for any.")
    return full


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("[^:@]*".join(re.escape(part) for part in pattern.split("*")))
