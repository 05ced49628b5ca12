"""The command line of `python -m train_jobs.finetune`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from cluster.model_card import Precision
from cluster.presets import Method
from train_jobs.command_line import Parser, UsageError, count, positive, settings
from train_jobs.messages import TrainOn
from train_jobs.trackers import TrackerName

DEFAULTS: dict[str, Any] = {"epochs": 3.0, "train_on": "all", "seed": 0, "set": []}
REQUIRED = ("model", "data", "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked for."""

    model: str
    data: str
    """A file, or `hf:org/name`."""
    name: str
    eval_data: str | None
    epochs: float
    max_steps: int | None
    method: Method | None
    precision: Precision | None
    max_length: int | None
    train_on: TrainOn
    num_workers: int | None
    min_workers: int | None = None
    """With how many workers the run goes on where there is no room for all; None: it waits."""
    seed: int
    checkpoint_steps: int | None = None
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    storage: str | None = None
    """Folder or URI below which the run keeps its checkpoints; None: `KAJIYA_HOME`."""
    track: TrackerName | None = None
    """Where the curves can be followed, besides the report."""
    overrides: dict[str, str]
    """Preset fields by name, values as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """A run to go on with. Everything else is as it was."""

    run: str
    """Its name, or that of the adapter."""
    data: str | None = None
    """Where the files lie now, unchanged."""
    eval_data: str | None = None
    storage: str | None = None
    num_workers: int | None = None
    min_workers: int | None = None


def read_resume(argv: Sequence[str]) -> Resume | None:
    """Return the run that `argv` wants to go on with, if that is what it wants.

    Raises:
        UsageError: An argument is unknown or malformed, or one that a run cannot change.
    """
    given = _given(argv)
    if "resume" not in given:
        return None
    run = given.pop("resume")
    fixed = sorted(given.keys() - {field.name for field in fields(Resume)})
    if fixed:
        flag = fixed[0].replace("_", "-")
        raise UsageError(f"--resume takes the arguments of the run as they were; leave out --{flag}.")
    return Resume(run=run, **given)


def read_arguments(argv: Sequence[str]) -> Request:
    """Return what `argv` asks for, a new run.

    Raises:
        UsageError: An argument is missing, unknown or malformed.
    """
    given = _given(argv)
    missing = [f"--{name}" for name in REQUIRED if name not in given]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}; --help shows the arguments.")
    if "early_stopping_patience" in given and "eval_steps" not in given:
        raise UsageError("--early-stopping-patience counts looks at the held-out part; say how often: --eval-steps 20.")
    words: dict[str, Any] = {field.name: None for field in fields(Request)} | DEFAULTS | given
    overrides = settings("--set", words.pop("set"), how="as field=value, as in --set r=8")
    return Request(**words | {"overrides": overrides})


def _given(argv: Sequence[str]) -> dict[str, Any]:
    given = {
        name: value
        for name, value in vars(parser("python -m train_jobs.finetune").parse_args(argv)).items()
        if value is not None
    }
    given.pop("debug")
    return given


def parser(usage: str) -> Parser:
    """Return what reads the options, for a command that is called as `usage`."""
    parser = Parser(
        prog=usage,
        description="Fine-tune a model on chat data with Ray Train and register the adapter.",
        allow_abbrev=False,
    )
    _add_wishes(parser)
    _add_lasting(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    return parser


def _add_wishes(parser: Parser) -> None:
    parser.add_argument("--model", help="name in the catalog, hub id, or folder")
    parser.add_argument("--data", help="a file, or hf:org/name; see the README for the formats")
    parser.add_argument("--name", help="name of the adapter; a new version if it exists")
    parser.add_argument("--eval-data", help="held-out examples; by default a tenth of --data")
    parser.add_argument("--epochs", type=positive, help=f"passes over the data; by default {DEFAULTS['epochs']}")
    parser.add_argument("--max-steps", type=count, help="optimizer steps; instead of --epochs")
    parser.add_argument("--method", choices=get_args(Method))
    parser.add_argument("--precision", choices=get_args(Precision), help="of the frozen base")
    parser.add_argument("--max-length", type=count, help="tokens of the longest sample that is trained whole")
    parser.add_argument("--train-on", choices=get_args(TrainOn), help="answers of a dialogue that are trained")
    parser.add_argument("--num-workers", type=count, help="data-parallel workers")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="append", metavar="FIELD=VALUE", help="a preset field, as in r=8")


def _add_lasting(parser: Parser) -> None:
    parser.add_argument("--checkpoint-steps", type=count, help="steps between checkpoints; by default a tenth of all")
    parser.add_argument("--eval-steps", type=count, help="steps between looks at the held-out part; the best is kept")
    parser.add_argument("--early-stopping-patience", type=count, help="looks without a lower loss that end the run")
    parser.add_argument("--min-workers", type=count, help="go on with so many, should there be no room for all")
    parser.add_argument("--storage", help="folder or URI for checkpoints, such as s3://bucket/runs")
    parser.add_argument(
        "--track", choices=get_args(TrackerName), help="follow plan, data, curves and answers there, too"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run, by its name or its adapter's")
