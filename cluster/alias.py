"""What the name of an adapter means: one version, and for a part of the users perhaps a candidate."""

import hashlib
from typing import Self

from pydantic import BaseModel, ConfigDict, Field


class Canary(BaseModel):
    """A version that is tried on a part of the users."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    percent: float = Field(gt=0, le=100)
    """Share of the users, not of the requests."""


class Alias(BaseModel):
    """What `model:name` means. Every change returns a new alias."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    previous: tuple[int, ...] = ()
    """Versions the name meant before, oldest first."""
    canary: Canary | None = None
    is_pinned: bool = False
    """Replicas keep `version` in memory once it is there."""
    last_version: int = 0
    """No number up to this one is given again, even when its version was deleted."""

    def version_for(self, adapter: str, user: str) -> int:
        """Return the version that `user` (any text that names one) gets of `adapter` (`model:name`)."""
        if self.canary is not None and percentile(f"{adapter}@{self.canary.version}", user) < self.canary.percent:
            return self.canary.version
        return self.version

    def promoted(self, version: int) -> Self:
        """Return the alias that means `version` for everybody; a canary is over with that."""
        previous = self.previous if version == self.version else (*self.previous, self.version)
        return self._with(version=version, previous=previous, canary=None)

    def rolled_back(self) -> Self | None:
        """Return the alias before the last step: without its canary, else with the version before; None at the first.

        A canary changes for some what the name means, so it is the last step while there is one.
        """
        if self.canary is not None:
            return self._with(canary=None)
        return self._with(version=self.previous[-1], previous=self.previous[:-1]) if self.previous else None

    def trying(self, canary: Canary) -> Self:
        """Return the alias with this canary in place of any other."""
        return self._with(canary=canary)

    def pinned(self, *, is_pinned: bool) -> Self:
        """Return the alias with the pin set or taken away."""
        return self._with(is_pinned=is_pinned)

    def without(self, version: int, *, last_version: int) -> Self:
        """Return the alias after the deletion of `version`, which it does not mean for anybody."""
        previous = tuple(v for v in self.previous if v != version)
        return self._with(previous=previous, last_version=max(self.last_version, last_version))

    def _with(self, **changes: object) -> Self:
        return self.model_copy(update=changes)


def percentile(salt: str, user: str) -> float:
    """Return a place from 0 up to 100 that is always the same for `user`, and even over all users.

    With the same salt, whoever is below one percentage is below every larger one. Another candidate has another salt,
    so that it is not always the same users on whom things are tried.
    """
    digest = hashlib.sha256(f"{salt}\0{user}".encode()).digest()
    return int.from_bytes(digest[:8]) * 100 / 2**64
