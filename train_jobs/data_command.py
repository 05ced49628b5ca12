"""`kajiya data`: look at training data before training on it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.catalog import find
from cluster.errors import UserError
from train_jobs.messages import TrainOn

if TYPE_CHECKING:  # it imports transformers
    from train_jobs.data_check import Report

app = typer.Typer(no_args_is_help=True, help="Check training data and show what is trained of it.")
out = Console()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DEFAULT_MAX_LENGTH = 2048


@app.callback()
def _group() -> None:
    """Keep `check` a word of its own, for the commands to come beside it."""


@app.command()
def check(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file, or hf:org/name.")],
    model: Annotated[str, typer.Option(help="Model whose template and tokenizer are used.")],
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a sample that are trained.")] = DEFAULT_MAX_LENGTH,
    train_on: Annotated[str, typer.Option(help="all answers of a dialogue, or the last.")] = "all",
    as_json: Json = False,  # noqa: FBT002 (typer reads it)
) -> None:
    """Count FILE's samples and tokens, name what is wrong, and show what is trained in colour; exit 1 if refused."""
    card = find(model)
    chosen = _train_on(train_on)
    from cluster.hub import ensure_available
    from cluster.models.base import load_tokenizer
    from train_jobs.data_check import check_data

    ensure_available(card)
    tokenizer = load_tokenizer(card)
    with Console(stderr=True).status(f"checking {source}") as status:
        report = check_data(
            source,
            tokenizer,
            max_length=max_length,
            stop_token_ids=card.stop_token_ids,
            train_on=chosen,
            on_progress=lambda num_records: status.update(f"checking {source}: {num_records} records"),
        )
    if as_json:
        lengths = report.quantiles()
        out.print_json(data=asdict(report) | {"lengths": lengths, "has_errors": report.has_errors})
    else:
        _print(report)
    raise typer.Exit(code=1 if report.has_errors else 0)


def _train_on(word: str) -> TrainOn:
    for known in get_args(TrainOn):
        if word == known:
            return known  # type: ignore[no-any-return]
    raise UserError(f"There is no --train-on {word!r}; choose one of {', '.join(get_args(TrainOn))}.")


def _print(report: "Report") -> None:
    lengths = ", ".join(f"{name} {length}" for name, length in report.quantiles().items())
    out.print(f"{report.format or 'No known format'}: {report.num_records} records, {report.num_samples} samples")
    out.print(f"{report.num_tokens} tokens, {report.num_trained_tokens} of them trained; lengths: {lengths}")
    if report.findings:
        table = Table("", "found", "where", "what to do")
        for finding in sorted(report.findings.values(), key=lambda f: (not f.is_error, -f.count)):
            mark = Text("✘", style="red") if finding.is_error else Text("!", style="yellow")
            places = "\n".join(finding.places) + (" …" if finding.count > len(finding.places) else "")
            table.add_row(mark, f"{finding.count} {finding.name}", Text(places), finding.advice)
        out.print(table)
    out.print("Samples as the model sees them; what is trained is [green]green[/]:")
    for spans in report.previews:
        preview = Text()
        for span in spans:
            preview.append(span.text, style="bold green" if span.is_trained else "dim")
        out.print(preview, soft_wrap=True)
        out.rule(style="dim")
