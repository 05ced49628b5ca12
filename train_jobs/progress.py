"""What a run says while it runs: a line for people, and the same as JSON for `kajiya train`."""

import json
import sys
from dataclasses import asdict, dataclass

PREFIX = "KAJIYA_PROGRESS "
"""Begins each line that is meant for a program; Ray puts the worker's name before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step of a pack."""

    step: int
    """Counts from 1."""
    num_steps: int
    losses: tuple[float, ...]
    """Of each adapter that took part: the mean over its own trained tokens, before the update."""
    learning_rates: tuple[float, ...]
    grad_norms: tuple[float, ...]
    """Before clipping; empty under DeepSpeed, which clips by itself."""
    num_tokens: int
    """Tokens of all workers that are no padding, prompts included."""
    duration_s: float


def announce(event: str, text: str, **values: object) -> None:
    """Print `text` for people, and for programs `event` with the text and `values`."""
    _write(text)
    _tell(event, text=text, **values)


def announce_step(metrics: StepMetrics) -> None:
    """Print one optimizer step."""
    rate = metrics.num_tokens / metrics.duration_s
    losses = " ".join(f"{loss:.4f}" for loss in metrics.losses)
    rates = " ".join(f"{lr:.2e}" for lr in metrics.learning_rates)
    _write(f"step {metrics.step}/{metrics.num_steps}  loss {losses}  lr {rates}  {rate:.0f} tokens/s")
    _tell("step", tokens_per_s=round(rate, 1), **asdict(metrics))


def _tell(event: str, **values: object) -> None:
    _write(PREFIX + json.dumps({"event": event, **values}, ensure_ascii=False))


def _write(line: str) -> None:
    # Not `print`: Ray Train replaces it in its workers, and everything would come twice.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
