"""`kajiya tune`: submit a search as a Ray job, and watch it as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from cluster.local_ray import dashboard_url, is_cluster_here, use_token
from train_jobs.command_line import job_words
from train_jobs.records import HUB_PREFIX
from tune_spaces.arguments import SearchRequest, parser, read_arguments
from tune_spaces.live_table import LiveTable
from tune_spaces.store import load_request

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

USAGE = "kajiya tune MODEL"
out = Console()


def tune(context: typer.Context) -> None:
    """Search rank, alpha and learning rate for MODEL, many trials on one base, and register the best adapter."""
    words = job_words(context.args)
    if not words or "--help" in words:
        parser(USAGE).print_help()
        return
    asked = read_arguments(words)
    use_token()  # Ray reads it when it is imported
    from tune_spaces.search import check

    if is_cluster_here():
        check(asked) if isinstance(asked, SearchRequest) else load_request(asked)
    url = dashboard_url()
    from train_jobs.submit import submit

    job_id = submit(url, "tune_spaces.search", words, _files(asked))
    out.print(f"Job {job_id}, shown at {url}/#/jobs/{job_id}", soft_wrap=True)
    _follow(url, job_id)


def _files(asked: SearchRequest | str) -> Sequence[Path]:
    named = (asked.data, asked.eval_data) if isinstance(asked, SearchRequest) else ()
    return [Path(file) for file in named if file is not None and not file.startswith(HUB_PREFIX)]


def _follow(url: str, job_id: str) -> None:
    from train_jobs.submit import follow, stop

    table = LiveTable()

    def on_event(event: dict[str, Any]) -> None:
        is_shown = table.take(event) and out.is_terminal
        if "text" in event and not is_shown:
            out.print(event["text"], highlight=False, markup=False, soft_wrap=True)

    try:
        if out.is_terminal:
            with Live(_Always(table), console=out, refresh_per_second=2):
                follow(url, job_id, on_event)
        else:
            follow(url, job_id, on_event)
    except KeyboardInterrupt:
        stop(url, job_id)
        name = table.search.get("search")
        kept = f"what its trials have reached is kept: kajiya tune --resume {name}" if name else "nothing was tried."
        out.print(f"Stopped {job_id}; {kept}", soft_wrap=True)
        raise


class _Always:
    """Draws the table as it is at the moment."""

    def __init__(self, table: LiveTable) -> None:
        self._table = table

    def __rich_console__(self, console: Console, _options: "ConsoleOptions") -> "RenderResult":
        shown: RenderableType = self._table.show(console)
        yield shown
