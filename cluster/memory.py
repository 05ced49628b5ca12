"""How many bytes a model needs: pure arithmetic, formula and source on each function."""

from dataclasses import dataclass

from cluster.errors import UserError

GIB = 2**30


class DoesNotFit(UserError, ValueError):
    """The planned run needs more memory than there is; the text holds the sum and what would fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryItem:
    """One part of the memory of a device."""

    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTable:
    """What one device (one GPU, or the RAM of the node) must hold, against what it has for it."""

    device: str
    items: tuple[MemoryItem, ...]
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the sum of the items."""
        return sum(item.num_bytes for item in self.items)

    @property
    def fits(self) -> bool:
        """Return whether the items fit into what is available."""
        return self.total_bytes <= self.available_bytes

    def num_bytes(self, name: str) -> int:
        """Return the bytes of the item called `name`, 0 if there is none."""
        return sum(item.num_bytes for item in self.items if item.name == name)
