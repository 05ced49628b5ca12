"""What a plan is made of while it is made, and its form as JSON."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.memory import DoesNotFit, MemoryTable
from cluster.presets import Decision, Source
from cluster.traps import ImpossibleCombination


@dataclass
class Log:
    """The decisions and warnings of a plan in the making."""

    decisions: list[Decision] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def decide(self, name: str, value: object, source: Source, reason: str) -> None:
        """Write down that `name` is `value`, and why."""
        self.decisions.append(Decision(field=name, value=str(value), reason=reason, source=source))

    def warn(self, *messages: str | None) -> None:
        """Add the messages that are not None, each once."""
        self.warnings += [m for m in messages if m is not None and m not in self.warnings]


def memory_json(table: MemoryTable) -> dict[str, Any]:
    """Return what follows from a table's fields: its sum, and whether it fits."""
    return {"total_bytes": table.total_bytes, "fits": table.fits}


Attempt = tuple[str, Callable[[], object]]
"""Words for a change of the wishes, and the plan that it would make."""


def what_fits(groups: Iterable[Iterable[Attempt]]) -> str:
    """Return a sentence with the first attempt of each group that makes a plan: nearest groups first."""
    options: list[str] = []
    for group in groups:
        for words, attempt in group:
            try:
                attempt()
            except (DoesNotFit, ImpossibleCombination):
                continue
            options.append(words)
            break
    return f"It fits {', or '.join(options)}." if options else "Nothing near it fits."
