"""Whether a version may take the place of another: both answer the same file, on the same base, in this process.

Not through the endpoint: it does not tell the loss of a given text, and its answers may come while others load it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from cluster.errors import UserError
from cluster.model_card import ModelCard, Precision
from cluster.registry import AdapterVersion
from train_jobs.data import read_data_file
from train_jobs.evaluate import evaluate
from train_jobs.messages import Dialogue
from train_jobs.scoring import evaluation_pack

Metric = Literal["loss", "exact_match"]
LOSS_NOISE = 1e-5
"""Relative difference that the same weights may show in another slot."""


class NotBetter(UserError, ValueError):
    """The candidate is worse than what it would take the place of, or there is nothing to compare them on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How two versions do on one file."""

    metric: Metric
    current: float
    candidate: float
    num_samples: int
    """Dialogues or texts of the loss, or answers that were compared."""

    @property
    def is_worse(self) -> bool:
        """Return whether the candidate is worse: a higher loss, or a smaller share of right answers."""
        if self.metric == "loss":
            return not self.candidate <= self.current * (1 + LOSS_NOISE)  # so that a NaN is worse
        return self.candidate < self.current


def compare(
    card: ModelCard, current: AdapterVersion, candidate: AdapterVersion, *, source: str | Path, metric: Metric
) -> Comparison:
    """Return how both versions do on the data in `source`, on the base in the precision the candidate was trained on.

    The loss is that of training, over what training would train. An exact match is a greedy answer that equals the
    last one of its dialogue, or contains its `answer_contains` where there is one; white space around does not count.

    Raises:
        DataError: the file cannot be read.
        NotBetter: it has no answer to compare with.
        WrongBase, BrokenAdapter: one of the versions cannot run on this base.
    """
    examples = read_data_file(source).examples
    if metric == "exact_match" and not any(isinstance(example, Dialogue) for example in examples):
        raise NotBetter(f"{source} has no dialogue that ends in an answer; use --metric loss.")
    pack, tokenizer = evaluation_pack(
        card, cast("Precision", candidate.manifest.precision), (current, candidate), examples, asks=metric != "loss"
    )
    num_samples = len(pack.job.held_out) if metric == "loss" else len(pack.job.questions)
    evaluations = [evaluate(pack, tokenizer, slot=slot) for slot in range(2)]
    scores = [e.loss if metric == "loss" else e.num_right / max(1, num_samples) for e in evaluations]
    return Comparison(metric=metric, current=scores[0], candidate=scores[1], num_samples=num_samples)


def ensure_not_worse(comparison: Comparison, current: AdapterVersion, candidate: AdapterVersion) -> None:
    """Raise `NotBetter` if the candidate is worse."""
    if comparison.is_worse:
        raise NotBetter(
            f"{candidate.served_name} is worse than version {current.version}: {comparison.metric} "
            f"{comparison.candidate:.4f} against {comparison.current:.4f} on {comparison.num_samples} samples; "
            f"nothing was promoted."
        )
