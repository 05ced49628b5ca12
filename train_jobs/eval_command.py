"""`kajiya eval`: how a model or an adapter does on a file."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.catalog import find
from cluster.home import KEY_VARIABLE

if TYPE_CHECKING:  # they import torch and OpenAI's client
    from train_jobs.scored import Score

out = Console()
NUM_ROWS = 20
"""Answers that the table shows; `--json` has them all."""
MAX_CHARACTERS = 120
"""Of a cell of the table."""


def evaluate(
    model: Annotated[str, typer.Argument(help="MODEL, MODEL:ADAPTER or MODEL:ADAPTER@VERSION.")],
    data: Annotated[str, typer.Option(help="Held-out examples: a file, or hf:org/name.")],
    url: Annotated[
        str | None, typer.Option(help="Ask this endpoint, as http://127.0.0.1:8000/v1, instead of loading the model.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first examples.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every answer.")] = False,  # noqa: FBT002
) -> None:
    """Measure MODEL on held-out data: loss, right answers, and what it answered.

    The model is loaded in this process, whatever is being served; with --url the endpoint answers, which tells no loss.
    """
    score = _served(url, model, data, limit) if url else _here(model, data, limit)
    if as_json:
        out.print_json(data=asdict(score) | {"num_right": score.num_right, "exact_match": score.exact_match})
    else:
        _print(score)


def _here(model: str, data: str, limit: int | None) -> "Score":
    from cluster.hub import ensure_available
    from cluster.registry import Registry
    from train_jobs.data import read_data_file

    name, _, ref = model.partition(":")
    card = find(name)
    version = Registry.default().resolve(card.name, ref) if ref else None
    read_data_file(data)
    ensure_available(card)
    from transformers.utils.logging import disable_progress_bar

    from train_jobs.scoring import score_here

    disable_progress_bar()  # of loading weights
    with out.status(f"Asking {model}"):
        return score_here(card, version, source=data, limit=limit)


def _served(url: str, model: str, data: str, limit: int | None) -> "Score":
    import openai

    from train_jobs.endpoint_scoring import score_served

    client = openai.OpenAI(base_url=url, api_key=os.environ.get(KEY_VARIABLE) or "none", max_retries=0)
    with out.status(f"Asking {model} at {url}") as status:
        on_answer = lambda done, of: status.update(f"{done} of {of} answers")  # noqa: E731
        return score_served(client, model, source=data, limit=limit, on_answer=on_answer)


def _print(score: "Score") -> None:
    loss = "the endpoint tells no loss" if score.loss is None else f"loss {score.loss:.4f} (base in {score.precision})"
    right = f", {score.num_right} of {len(score.answers)} answers right" if score.answers else ", nothing to ask"
    out.print(f"{score.model} on {score.data} ({score.num_samples} examples): {loss}{right}", soft_wrap=True)
    if not score.answers:
        return
    table = Table("")
    for heading in ("question", "expected", "answer"):
        table.add_column(heading, overflow="fold")  # Japanese has no blanks to break a line at
    for row in score.answers[:NUM_ROWS]:
        mark = Text("✔", style="green") if row.is_right else Text("✘", style="red")
        table.add_row(mark, *(Text(_short(text)) for text in (row.question, row.expected, row.answer)))
    out.print(table)
    if len(score.answers) > NUM_ROWS:
        out.print(f"{len(score.answers) - NUM_ROWS} more with --json")


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
