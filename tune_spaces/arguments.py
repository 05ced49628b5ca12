"""The command line of `python -m tune_spaces.search`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from cluster.model_card import Precision
from cluster.presets import Method
from train_jobs.command_line import Parser, UsageError, count, duration_s, positive, settings, share
from tune_spaces.objectives import OBJECTIVES, read_objectives
from tune_spaces.spaces import SPACES
from tune_spaces.values import Values, read_values

SCHEDULERS = ("asha", "median", "fifo", "pbt")
SEARCHERS = ("random", "grid", "optuna")
DEFAULT_TRIALS = 16
DEFAULT_EPOCHS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """What the user asked for."""

    model: str
    data: str
    name: str
    eval_data: str | None
    space: str
    trials: int
    searcher: str
    scheduler: str
    objectives: tuple[str, ...]
    """The first is what trials are compared by while they run."""
    within: float
    """Share of the first objective that may be given up for the next ones."""
    epochs: float
    max_steps: int | None
    max_time_s: float | None
    max_gpu_hours: float | None
    method: Method | None
    precision: Precision | None
    max_length: int | None
    num_workers: int | None
    """Bases, or trials at a time where each is a run of its own."""
    workers_per_trial: int | None
    seed: int
    promote: bool
    baseline: bool
    """Whether the trial of the plan's own values goes to its end, whatever the scheduler thinks of it."""
    changes: dict[str, Values]
    """Fields of the space that the user set."""
    overrides: dict[str, str]
    """Fields of the plan, where the space does not have them."""

    @property
    def objective(self) -> str:
        """Return the first objective."""
        return self.objectives[0]

    @property
    def mode(self) -> str:
        """Return whether the first objective is to be small or large."""
        return OBJECTIVES[self.objective].mode


def read_arguments(argv: Sequence[str]) -> SearchRequest | str:
    """Return what `argv` asks for: a search, or the name of one to resume.

    Raises:
        UsageError, BadSpace: An argument is missing, unknown or malformed.
    """
    words = vars(parser("python -m tune_spaces.search").parse_args(argv))
    words.pop("debug")
    resume = words.pop("resume")
    if resume:
        return str(resume)
    missing = [name for name in ("model", "data", "name") if words[name] is None]
    if missing:
        raise UsageError(f"--{missing[0]} is missing; --help shows the arguments.")
    overrides = settings("--set", words.pop("set"), how="with =, as in --set micro_batch_size=4")
    texts = settings("--set-space", words.pop("set_space"), how="with =, as in --set-space r=8,16,32")
    changes = {field: read_values(field, text) for field, text in texts.items()}
    objectives = read_objectives(words.pop("objective"))
    return SearchRequest(**words, objectives=objectives, changes=changes, overrides=overrides)


def parser(usage: str) -> Parser:
    """Return what reads the options, for a command that is called as `usage`."""
    parser = Parser(
        prog=usage,
        description="Search rank, alpha and learning rate with Ray Tune, many trials on one base; register the best.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="name in the catalog, hub id, or folder")
    parser.add_argument("--data", help="a file, or hf:org/name")
    parser.add_argument("--name", help="name of the adapter; a new version if it exists")
    parser.add_argument("--resume", metavar="SEARCH", help="go on with a search that was cut short")
    parser.add_argument("--eval-data", help="held-out examples; by default a tenth of --data")
    _add_search(parser)
    _add_cost(parser)
    _add_trial(parser)
    parser.add_argument("--no-promote", dest="promote", action="store_false", help="register without promoting")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    return parser


def _add_search(parser: Parser) -> None:
    parser.add_argument("--space", default="standard", choices=tuple(SPACES))
    parser.add_argument("--trials", "--max-trials", type=count, default=DEFAULT_TRIALS, help="points to try")
    parser.add_argument("--searcher", default="random", choices=SEARCHERS)
    parser.add_argument("--scheduler", default="asha", choices=SCHEDULERS)
    parser.add_argument(
        "--objective",
        default="held_out_loss",
        metavar="NAME[,NAME...]",
        help=f"{', '.join(OBJECTIVES)}; of several, the first is what trials are compared by while they run",
    )
    parser.add_argument(
        "--within",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="how much of the first objective may be given up for the next ones; 0.02 is 2%%",
    )
    parser.add_argument(
        "--set-space",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="what is tried of a field: r=8,16 or learning_rate=1e-5..1e-3",
    )
    parser.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="let the scheduler stop the trial of the plan's own values too; by default it goes to its end, to compare",
    )


def _add_cost(parser: Parser) -> None:
    parser.add_argument("--epochs", type=positive, default=DEFAULT_EPOCHS, help="passes over the data of a whole trial")
    parser.add_argument("--max-steps", type=count, help="optimizer steps of a whole trial; instead of --epochs")
    parser.add_argument(
        "--max-time",
        dest="max_time_s",
        type=duration_s,
        metavar="TIME",
        help="after which the best so far is kept: 90s, 30m, 1h30m",
    )
    parser.add_argument("--max-gpu-hours", type=positive, help="hours of all GPUs (workers, on a CPU) together")


def _add_trial(parser: Parser) -> None:
    parser.add_argument("--method", choices=get_args(Method))
    parser.add_argument("--precision", choices=get_args(Precision), help="of the frozen base")
    parser.add_argument("--max-length", type=count, help="tokens of the longest sample that is trained whole")
    parser.add_argument("--num-workers", type=count, help="bases; by default one for each GPU, one on a CPU")
    parser.add_argument(
        "--workers-per-trial",
        type=count,
        help="with more than 1, each trial is a run of its own; by default what it needs",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a preset field of all trials"
    )
