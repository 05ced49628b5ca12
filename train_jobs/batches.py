"""Which samples make up which batch: from the seed alone, whatever the number of workers.

B = rows, T = tokens of the longest row.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train_jobs.tokens import IGNORED, Sample

LENGTH_WINDOW = 4
"""Batches among which samples are sorted by length: more waste less on padding, fewer mix the data better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """The order of one adapter's samples over all epochs. Random access: a resumed run needs the step alone."""

    lengths: tuple[int, ...]
    batch_size: int
    """Samples per optimizer step, over all workers and micro-batches."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps in which every sample is seen once."""
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the samples of optimizer step `step`, the shortest first."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[list[int]]:
        shuffler = random.Random(f"{self.seed}/{epoch}")  # noqa: S311 -- an order, not a secret
        order = list(range(len(self.lengths)))
        shuffler.shuffle(order)
        window = self.batch_size * LENGTH_WINDOW
        batches = []
        for start in range(0, len(order), window):
            similar = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [similar[i : i + self.batch_size] for i in range(0, len(similar), self.batch_size)]
        shuffler.shuffle(batches)
        return batches


def chunk(num_rows: int, num_chunks: int, index: int) -> range:
    """Return which of a batch's rows are chunk `index`: contiguous, so of similar length, and of equal size or nearly.

    A batch has `num_workers x gradient_accumulation_steps` chunks; chunk `micro_step x num_workers + rank` is a
    worker's. So the batch is the same however it is cut.
    """
    return range(num_rows * index // num_chunks, num_rows * (index + 1) // num_chunks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A micro-batch as tensors, padded on the right."""

    input_ids: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T]
    num_tokens: int
    """Tokens that are no padding."""


def collate(samples: Sequence[Sample], *, pad_token_id: int, device: torch.device) -> Rows:
    """Return `samples` as one micro-batch.

    There is no attention mask: every position looks back only, so what is behind a sample's end reaches no label.
    """
    width = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), width), pad_token_id)
    labels = torch.full((len(samples), width), IGNORED)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    return Rows(input_ids=input_ids.to(device), labels=labels.to(device), num_tokens=num_tokens)
