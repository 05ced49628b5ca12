"""What a measurement has to show, and how that is printed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A number that was measured, and the bound it has to keep."""

    what: str
    measured: float
    bound: float
    direction: Literal["at least", "at most"]
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        """Return whether the bound is kept."""
        return self.measured >= self.bound if self.direction == "at least" else self.measured <= self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One measurement: every number for the record, and what follows from them."""

    numbers: dict[str, Any]
    """By name of what was measured: as `load.spread` returns it."""
    unit: str
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()


def print_result(name: str, result: Result, console: Console) -> None:
    """Print the medians with their spread."""
    table = Table(name, f"median, {result.unit}", "lowest", "highest", title_justify="left")
    for row, values in result.numbers.items():
        table.add_row(row, *(f"{values[key]:.4g}" for key in ("median", "lowest", "highest")))
    console.print(table)
    for note in result.notes:
        console.print(note)


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """Print one line per claim."""
    table = Table("what", "measured", "required", "")
    for claim in claims:
        required = f"{claim.direction} {claim.bound:g} {claim.unit}"
        table.add_row(claim.what, f"{claim.measured:.3g} {claim.unit}", required, "met" if claim.is_met else "NOT MET")
    console.print(table)


def conclude(results: dict[str, Result], console: Console, path: Path | None) -> NoReturn:
    """Print all claims, write every number to `path`, and exit: with 1 when a bound is not kept."""
    claims = [claim for result in results.values() for claim in result.claims]
    print_claims(claims, console)
    if path is not None:
        path.write_text(json.dumps(record(results), indent=2) + "\n")
    raise SystemExit(not all(claim.is_met for claim in claims))


def record(results: dict[str, Result]) -> dict[str, Any]:
    """Return everything that was measured as plain JSON types."""
    return {
        name: {
            "unit": result.unit,
            "numbers": result.numbers,
            "claims": [
                {
                    "what": claim.what,
                    "measured": claim.measured,
                    claim.direction: claim.bound,
                    "unit": claim.unit,
                    "is_met": claim.is_met,
                }
                for claim in result.claims
            ],
            "notes": result.notes,
        }
        for name, result in results.items()
    }
