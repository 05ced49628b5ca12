"""A page that needs nothing else: its style, tables and plots lie in the one file."""

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.6 system-ui, "Hiragino Sans", "Noto Sans CJK JP", sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.7rem; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px; width: 100% }
td, th { padding: .25rem .7rem; text-align: right; vertical-align: top }
th { font-weight: 600; color: #555; border-bottom: 1px solid #ccc; white-space: nowrap }
table.words td, table.words th { text-align: left; overflow-wrap: break-word }
tr:nth-child(even) { background: #f6f6f8 } tr.best { background: #dff2e1; font-weight: 600 }
.right { color: #1b7837; font-weight: 600 } .wrong { color: #b2182b; font-weight: 600 }
svg { max-width: 100%; height: auto }
dl { margin: 0 } dt { color: #666; font-size: 14px } dd { margin: 0 0 .4rem; overflow-wrap: anywhere }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.cards div { background: #f6f6f8; padding: .5rem 1rem; border-radius: 6px }
.cards span { display: block; font-size: 13px; color: #666 } .cards b { font-size: 1.25rem }
section { break-inside: avoid }
@media (max-width: 40rem) { .wide svg { width: 36rem; max-width: none } body { margin: 1rem auto } }
@media print { body { max-width: none; margin: 0; font-size: 12px } .wide { overflow: visible }
  table, .wide table { font-size: 9px } td, th { padding: .15rem .4rem } }
pre { background: #f6f6f8; padding: .7rem 1rem; border-radius: 6px; overflow-x: auto; font-size: 14px }
"""


def write_page(text: str, path: Path) -> None:
    """Write the page to `path`, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def document(title: str, body: str) -> str:
    """Return the page around `body`, which is HTML; `title` is text."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>"
    )


def facts(values: Mapping[str, str]) -> str:
    """Return names and their values, one below the other."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in values.items())
    return f"<dl>{rows}</dl>"


def cards(values: Mapping[str, str]) -> str:
    """Return the few numbers that matter most, side by side."""
    each = (f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>" for name, value in values.items())
    return f'<div class="cards">{"".join(each)}</div>'


def word_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="words"><tr>{head}</tr>{"".join(lines)}</table></div>'


def new_figure(*, height: float = 3.5) -> "tuple[Figure, Any]":
    """Return an empty plot, 8 by `height` inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: "Figure") -> str:
    """Return the plot as an element of a page; letters are drawn as paths, so keep them to what is in every font."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
