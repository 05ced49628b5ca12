"""What the jobs' command lines share: errors of one line, and numbers within their bounds."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cluster.errors import UserError
from train_jobs.interrupt import treat_sigterm_as_ctrl_c

NUMBER = r"(\d+(?:\.\d+)?)"
DURATION = re.compile(f"(?:{NUMBER}h)?(?:{NUMBER}m)?(?:{NUMBER}s?)?")


class UsageError(UserError, ValueError):
    """An argument that is missing, unknown or malformed."""


PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Of a typer command, to the job's own parser: the options are written down once."""


def job_words(given: Sequence[str]) -> list[str]:
    """Return the arguments of a job from those of its command, which may begin with the model alone."""
    return ["--model", *given] if given and not given[0].startswith("-") else list(given)


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say."""
        raise UsageError(f"{message}; --help shows the arguments.")


def settings(flag: str, given: Sequence[str], *, how: str) -> dict[str, str]:
    """Return the values of `flag`, which may come several times, by field; raises `UsageError`, which says `how`."""
    wrong = [setting for setting in given if "=" not in setting]
    if wrong:
        raise UsageError(f"{flag} {wrong[0]}: write it {how}.")
    return dict(setting.split("=", 1) for setting in given)


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count of at least 1")
    return number


def positive(text: str) -> float:
    """Return a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def duration_s(text: str) -> float:
    """Return the seconds of `1h30m`, `45m`, `90s` or plain `90`."""
    found = DURATION.fullmatch(text)
    seconds = (
        sum(float(part or 0) * unit_s for part, unit_s in zip(found.groups(), (3600, 60, 1), strict=True))
        if found
        else 0
    )
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0, as 90s, 30m or 1h30m are")
    return seconds


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def run_command(work: Callable[[Sequence[str]], object], argv: Sequence[str], *, when_stopped: str) -> int:
    """Return the exit code of `work`; an error of the user's is one line on stderr and 2, `--debug` shows where."""
    treat_sigterm_as_ctrl_c()
    try:
        work(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"error: stopped; {when_stopped}", file=sys.stderr, flush=True)
        return 130
    return 0
