"""The command line of `python -m train_jobs.finetune`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from cluster.model_card import Precision
from cluster.presets import Method
from train_jobs.command_line import Parser, UsageError, count, positive
from train_jobs.messages import TrainOn

DEFAULT_EPOCHS = 3.0


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
    seed: int
    overrides: dict[str, str]
    """Preset fields by name, values as text."""


def read_arguments(argv: Sequence[str]) -> Request:
    """Return what `argv` asks for.

    Raises:
        UsageError: An argument is missing, unknown or malformed.
    """
    words = vars(_parser().parse_args(argv))
    words.pop("debug")
    settings = words.pop("set")
    wrong = [setting for setting in settings if "=" not in setting]
    if wrong:
        raise UsageError(f"--set {wrong[0]}: write it as field=value, as in --set r=8.")
    return Request(**words, overrides=dict(setting.split("=", 1) for setting in settings))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m train_jobs.finetune",
        description="Fine-tune a model on chat data with Ray Train and register the adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="name in the catalog, hub id, or folder")
    parser.add_argument("--data", required=True, help="a file, or hf:org/name; see the README for the formats")
    parser.add_argument("--name", required=True, help="name of the adapter; a new version if it exists")
    parser.add_argument("--eval-data", help="held-out examples; by default a tenth of --data")
    parser.add_argument("--epochs", type=positive, default=DEFAULT_EPOCHS, help="passes over the data")
    parser.add_argument("--max-steps", type=count, help="optimizer steps; instead of --epochs")
    parser.add_argument("--method", choices=get_args(Method))
    parser.add_argument("--precision", choices=get_args(Precision), help="of the frozen base")
    parser.add_argument("--max-length", type=count, help="tokens of the longest sample that is trained whole")
    parser.add_argument(
        "--train-on", choices=get_args(TrainOn), default="all", help="answers of a dialogue that are trained"
    )
    parser.add_argument("--num-workers", type=count, help="data-parallel workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a preset field, as in r=8")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    return parser
