"""Which samples make up which batch: from the seed alone, whatever the number of workers.

N = tokens of all samples of a micro-batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from train_jobs.tokens import IGNORED, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """The order of one adapter's samples over all epochs. Random access: a resumed run needs the step alone."""

    lengths: npt.NDArray[np.int32]
    """Tokens of each sample."""
    batch_size: int
    """Samples per optimizer step, over all workers and micro-batches."""
    seed: int
    _epochs: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The epoch that was asked for last: four bytes per sample, a second's work for millions of them."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps in which every sample is seen once."""
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the samples of optimizer step `step`, the shortest first."""
        epoch, position = divmod(step, self.steps_per_epoch)
        batch = self._epoch(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        shortest_first: list[int] = batch[np.argsort(self.lengths[batch], kind="stable")].tolist()
        return shortest_first

    def _epoch(self, epoch: int) -> npt.NDArray[np.int32]:
        if epoch not in self._epochs:
            order = np.arange(len(self.lengths), dtype=np.int32)
            np.random.default_rng([self.seed % 2**64, epoch]).shuffle(order)
            self._epochs.clear()
            self._epochs[epoch] = order
        return self._epochs[epoch]


def chunk(num_rows: int, num_chunks: int, index: int) -> range:
    """Return which of a batch's rows are chunk `index`: every `num_chunks`-th, so chunks are of the same size, nearly.

    A batch has `num_workers x gradient_accumulation_steps` chunks; chunk `micro_step x num_workers + rank` is a
    worker's. So the batch is the same however it is cut. Rows are sorted by length: all chunks get short and long ones.
    """
    return range(index, num_rows, num_chunks)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Samples end to end in one row, without padding, a block of them per adapter."""

    input_ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [1, N]: from 0 in each sample
    labels: torch.Tensor  # [1, N]: none on a sample's first token, which nothing before it predicts
    blocks: torch.Tensor  # [1, N]: the block each token belongs to
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    counts: tuple[int, ...]
    """Samples of each block."""


def collate(blocks: Sequence[Sequence[Sample]], *, device: torch.device) -> MicroBatch:
    """Return the samples of each of `blocks` as one micro-batch."""
    samples = [sample for block in blocks for sample in block]
    lengths = [len(sample.input_ids) for sample in samples]
    block_of_sample = [number for number, block in enumerate(blocks) for _ in block]
    return MicroBatch(
        input_ids=_row((sample.input_ids for sample in samples), device),
        position_ids=_row(map(range, lengths), device),
        labels=_row(((IGNORED, *sample.labels[1:]) for sample in samples), device),
        blocks=torch.tensor(block_of_sample).repeat_interleave(torch.tensor(lengths))[None].to(device),
        lengths=tuple(lengths),
        counts=tuple(map(len, blocks)),
    )


def _row(parts: Iterable[Iterable[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor([list(chain.from_iterable(parts))], device=device)
