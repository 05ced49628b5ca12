"""A running search as a table that lives in the terminal, fed by what the search announces."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tune_spaces.text import in_words, short, words

ROOM = 12
"""Lines of the terminal that are left for what is printed above and below the trials."""
STYLES = {"running": "cyan", "finished": "green", "failed": "red", "diverged": "red", "stopped": "dim"}


@dataclass(kw_only=True, slots=True)
class Row:
    """A trial as far as it is known."""

    config: Mapping[str, Any]
    state: str = "waiting"
    step: int = 0
    value: float | None = None
    """The objective."""
    training_loss: float | None = None


@dataclass(kw_only=True, slots=True)
class LiveTable:
    """What is known of a search; `take` events and show it."""

    clock: Callable[[], float] = time.monotonic
    search: dict[str, Any] = field(default_factory=dict)
    """The event that opened the search."""
    rows: dict[str, Row] = field(default_factory=dict)
    """By trial."""
    predicted_s: float | None = None
    spent_s: float = 0.0
    seen_s: float = 0.0
    """When that was said, by `clock`."""

    def take(self, event: Mapping[str, Any]) -> bool:
        """Note an announced event; False where the table does not show it, so that its text should be printed."""
        kind = event["event"]
        if kind == "search":
            self.search = dict(event)
            for note in event.get("before", ()):
                self._note(note.get("trial_id"), note | {"value": note.get(event["objective"])})
        elif kind == "cost":
            self.predicted_s = event["predicted_s"]
        elif not kind.startswith("trial"):
            return False
        self._note(event.get("trial"), event)
        return kind not in ("search", "trial_recover")

    def _note(self, trial: str | None, event: Mapping[str, Any]) -> None:
        if "spent_s" in event:
            self.spent_s, self.seen_s = event["spent_s"], self.clock()
        if trial is None:
            return
        row = self.rows.setdefault(trial, Row(config=event.get("config", {})))
        row.config = event.get("config", row.config)
        for name in ("state", "step", "value", "training_loss"):
            if event.get(name) is not None:
                setattr(row, name, event[name])

    @property
    def best(self) -> str | None:
        """Return the trial that is the best so far."""
        sign = -1 if self.search.get("mode") == "max" else 1
        valued = {name: sign * row.value for name, row in self.rows.items() if row.value is not None}
        return min(valued, key=lambda name: valued[name]) if valued else None

    def show(self, console: Console) -> RenderableType:
        """Return the table and the line below it."""
        if not self.rows:
            return Text("loading the base", style="dim")
        names = sorted(self.rows, key=self._place)
        shown = names[: max(3, console.height - ROOM)]
        table = self._empty()
        for name in shown:
            self._add(table, name)
        more = [Text(f"… and {len(names) - len(shown)} more", style="dim")] if len(shown) < len(names) else []
        return Group(table, *more, self._summary())

    def _place(self, name: str) -> tuple[bool, float]:
        row = self.rows[name]
        value = float("inf") if row.value is None else row.value * (-1 if self.search.get("mode") == "max" else 1)
        return row.state not in ("running", "waiting"), value

    def _fields(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows.values() for name in row.config))

    def _empty(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("trial", no_wrap=True)
        for name in (*self._fields(), "step", "loss", self.search.get("objective", "objective")):
            table.add_column(name, justify="right")
        table.add_column("state")
        return table

    def _add(self, table: Table, name: str) -> None:
        row, is_best = self.rows[name], name == self.best
        values = [short(row.config[key]) if key in row.config else "" for key in self._fields()]
        step = f"{row.step}/{self.search.get('num_steps', '?')}"
        loss, value = (f"{x:.4f}" if x is not None else "" for x in (row.training_loss, row.value))
        state = Text("best, " * is_best + row.state, style=STYLES.get(row.state, ""))
        table.add_row(name, *values, step, loss, value, state, style="bold" if is_best else "")

    def _summary(self) -> Text:
        over = sum(row.state not in ("running", "waiting") for row in self.rows.values())
        spent_s = self.spent_s + (self.clock() - self.seen_s if self.seen_s else 0)
        hours, kind = self.search.get("num_workers", 1) / 3600, self.search.get("hours_of", "worker")
        line = f"{over} of {self.search.get('num_trials', '?')} trials over · {in_words(spent_s)}"
        line += f" of about {in_words(self.predicted_s)}" if self.predicted_s else ""
        line += f" · {spent_s * hours:.2g}"
        line += f" of about {self.predicted_s * hours:.2g}" if self.predicted_s else ""
        line += f" {kind} hours"
        line += f" · budget {in_words(limit)}" if (limit := self.search.get("limit_s")) else ""
        best = self.rows[self.best] if self.best else None
        found = f"\nbest so far: {words(best.config)}  {self.search.get('objective')} {best.value:.4f}" if best else ""
        return Text(line + found)
