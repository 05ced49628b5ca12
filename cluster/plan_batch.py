"""Micro batch and accumulation: the table's first guess, shrunk until it fits, with the effective batch held."""

from dataclasses import dataclass

from cluster.model_card import ModelCard, Precision
from cluster.presets import batch_size
from cluster.training_wishes import TrainingWishes


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """How the samples of one optimizer step are split."""

    micro_batch_size: int
    gradient_accumulation_steps: int

    def effective(self, num_workers: int) -> int:
        """Return the samples per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * num_workers


def wanted_batch_size(card: ModelCard, precision: Precision, wishes: TrainingWishes, accumulation: int) -> int:
    """Return the effective batch that a plan holds: the wish, or the table's batch times the preset's accumulation.

    One worker is the measure: more workers share the same batch, so a run learns the same on any machine.
    """
    if wishes.effective_batch_size is not None:
        return wishes.effective_batch_size
    if wishes.micro_batch_size is not None and wishes.gradient_accumulation_steps is not None:
        return wishes.micro_batch_size * wishes.gradient_accumulation_steps * (wishes.num_workers or 1)
    return batch_size(card, precision) * (wishes.gradient_accumulation_steps or accumulation)


def batches(
    card: ModelCard, precision: Precision, wishes: TrainingWishes, *, effective: int, num_workers: int
) -> list[Batch]:
    """Return the splits of `effective` samples to try, the largest micro batch first.

    Where the workers do not divide the batch, it grows to the next size that they do.
    """
    per_worker = -(-effective // num_workers)
    if wishes.micro_batch_size is not None:
        micros = [wishes.micro_batch_size]
    else:
        first = min(batch_size(card, precision), per_worker)
        if wishes.gradient_accumulation_steps is not None:
            first = min(first, -(-per_worker // wishes.gradient_accumulation_steps))
        micros = [first >> shift for shift in range(first.bit_length())]
    splits = []
    for micro in micros:
        steps = -(-per_worker // micro)
        even = micro if wishes.micro_batch_size is not None else -(-per_worker // steps)
        splits.append(Batch(micro_batch_size=even, gradient_accumulation_steps=steps))
    return splits
