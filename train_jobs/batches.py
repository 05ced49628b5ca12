"""Which samples make up which batch: from the seed alone, whatever the number of workers.

N = tokens of all samples of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from train_jobs.tokens import IGNORED, Sample

NUM_PROBED = 64
"""Samples that tell how all begin; one that does not loses nothing but the saving."""
SHORTEST_OPENING = 8
"""Tokens; of fewer, the saving is not worth the copies."""


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


class Segment(NamedTuple):
    """Tokens that lie together in a micro-batch: a sample, or an opening that several samples share."""

    length: int
    block: int
    after: int | None
    """The segment, in this micro-batch, that it goes on from."""
    sample: int | None
    """Its sample's number in the micro-batch; None for an opening."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Segments end to end in one row, without padding, a block of them per adapter."""

    input_ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [1, N]: from 0 in each sample
    labels: torch.Tensor  # [1, N]: none on a segment's first token, which nothing right before it predicts
    blocks: torch.Tensor  # [1, N]: the block each token belongs to
    segments: tuple[Segment, ...]
    counts: tuple[int, ...]
    """Segments of each block."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of each segment."""
        return tuple(segment.length for segment in self.segments)

    @property
    def parents(self) -> tuple[int | None, ...]:
        """Return the segment that each one goes on from."""
        return tuple(segment.after for segment in self.segments)


def collate(blocks: Sequence[Sequence[Sample]], *, device: torch.device, opening: Sequence[int] = ()) -> MicroBatch:
    """Return the samples of each of `blocks` as one micro-batch; what is theirs in common is `opening`, once a block.

    Samples that begin otherwise stand by themselves.
    """
    row = _Row()
    samples = ((number, sample) for number, block in enumerate(blocks) for sample in block)
    openings: dict[int, int] = {}
    for place, (block, sample) in enumerate(samples):
        start = len(opening) if _goes_on(sample, opening) else 0
        if start and block not in openings:
            openings[block] = row.add(opening, (IGNORED,) * start, Segment(start, block, None, None), first=0)
        length, after = len(sample.input_ids) - start, openings[block] if start else None
        segment = Segment(length, block, after, place)
        row.add(sample.input_ids[start:], (IGNORED, *sample.labels[start + 1 :]), segment, first=start)
    segments = tuple(row.segments)
    return MicroBatch(
        input_ids=torch.tensor([row.input_ids], device=device),
        position_ids=torch.tensor([row.position_ids], device=device),
        labels=torch.tensor([row.labels], device=device),
        blocks=torch.tensor([[s.block for s in segments for _ in range(s.length)]], device=device),
        segments=segments,
        counts=tuple(sum(segment.block == number for segment in segments) for number in range(len(blocks))),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, input_ids: Sequence[int], labels: Sequence[int], segment: Segment, *, first: int) -> int:
        """Append `segment`, whose first token is at `first` in its sample, and return its number."""
        self.input_ids.extend(input_ids)
        self.labels.extend(labels)
        self.position_ids.extend(range(first, first + segment.length))
        self.segments.append(segment)
        return len(self.segments) - 1


def _goes_on(sample: Sample, opening: Sequence[int]) -> bool:
    size = len(opening)
    begins = len(sample.input_ids) > size and tuple(sample.input_ids[:size]) == tuple(opening)
    return begins and all(label == IGNORED for label in sample.labels[: size + 1])


def opening_of(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Return how the samples begin, by the first few: a chat template's system prompt, above all.

    What has a label, and the token whose label the opening's last token would predict, is not part of it.
    """
    probe = [samples[i] for i in range(min(NUM_PROBED, len(samples)))]
    if not probe:
        return ()
    columns = zip(*(sample.input_ids for sample in probe), strict=False)
    size = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    for sample in probe:
        labelled = next((i for i, label in enumerate(sample.labels) if label != IGNORED), len(sample.labels))
        size = min(size, labelled - 1, len(sample.input_ids) - 1)
    return tuple(probe[0].input_ids[:size]) if size >= SHORTEST_OPENING else ()


def passes_of(num_tokens: Sequence[int], *, limit: int) -> list[range]:
    """Return consecutive parts of a step with at most `limit` tokens each, or one adapter where that has more."""
    parts: list[range] = []
    total = 0
    for number, count in enumerate(num_tokens):
        if not parts or total + count > limit:
            parts.append(range(number, number))
            total = 0
        parts[-1] = range(parts[-1].start, number + 1)
        total += count
    return parts
