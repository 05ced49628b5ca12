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
TRAINED_MARKS = ("⟦", "⟧")
"""Around what is trained where there are no colours, as in a file."""
PREVIEW_CHARACTERS = 300
"""That are shown of the beginning and the end of a long text."""


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
        _print(report, source)
    raise typer.Exit(code=1 if report.has_errors else 0)


def _train_on(word: str) -> TrainOn:
    for known in get_args(TrainOn):
        if word == known:
            return known  # type: ignore[no-any-return]
    raise UserError(f"There is no --train-on {word!r}; choose one of {', '.join(get_args(TrainOn))}.")


def _print(report: "Report", source: str) -> None:
    lengths = ", ".join(f"{name} {length}" for name, length in report.quantiles().items())
    form = report.format or "no known format"
    out.print(f"{source}: {form}, {report.num_records} records, {report.num_samples} samples", soft_wrap=True)
    out.print(f"{report.num_tokens} tokens, {report.num_trained_tokens} of them trained; lengths: {lengths}")
    if report.findings:
        out.print(_findings(report, source))
    if report.has_errors:
        out.print("Training refuses it as it is.", style="red")
    if report.previews:
        _print_previews(report)


def _findings(report: "Report", source: str) -> Table:
    table = Table()
    for head in ("", "found", "where", "what to do"):
        table.add_column(head, overflow="fold")
    for finding in sorted(report.findings.values(), key=lambda f: (not f.is_error, -f.count)):
        mark = Text("✘", style="red") if finding.is_error else Text("!", style="yellow")
        # The name of the file stands above, and would leave no room for the line.
        places = [p.replace(f"{source}: ", "").replace(f"{source}:", "line ") for p in finding.places]
        more = " …" if finding.count > len(places) else ""
        table.add_row(mark, f"{finding.count} × {finding.name}", Text("\n".join(places) + more), finding.advice)
    return table


def _print_previews(report: "Report") -> None:
    is_coloured = out.color_system is not None
    marks = ("", "") if is_coloured else TRAINED_MARKS
    how = "[green]green[/]" if is_coloured else "in " + " ".join(marks)
    out.print(f"Samples as the model sees them; what is trained is {how}:")
    for spans in report.previews:
        preview = Text()
        for span in spans:
            text = _excerpt(span.text)
            preview.append(
                f"{marks[0]}{text}{marks[1]}" if span.is_trained else text,
                style="bold green" if span.is_trained else "dim",
            )
        out.print(preview, soft_wrap=True)
        out.rule(style="dim")


def _excerpt(text: str) -> str:
    """Return `text`, without the middle of a long one."""
    num_left_out = len(text) - 2 * PREVIEW_CHARACTERS
    if num_left_out <= 0:
        return text
    return f"{text[:PREVIEW_CHARACTERS]} … {num_left_out} characters … {text[-PREVIEW_CHARACTERS:]}"
