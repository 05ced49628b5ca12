"""From some records of a file to their tokens, packed; the same code runs in the driver and on a cluster.

N = tokens, S = samples, E = examples of the block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from train_jobs.data import check
from train_jobs.formats import Format
from train_jobs.messages import Dialogue, Document, TrainOn
from train_jobs.records import DataError, Record, read_records
from train_jobs.tokens import IGNORED, Sample, cut_samples

BLOCK_RECORDS = 512
"""Enough to keep a tokenizer busy for a tenth of a second, few enough to lie in memory by the dozen."""

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRule:
    """How examples become tokens, beside the tokenizer."""

    max_length: int
    stop_token_ids: tuple[int, ...]
    train_on: TrainOn


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlock:
    """The samples of neighbouring records."""

    tokens: Int32
    """[N]: the id of a trained token, the complement (`~id`) of one that is not."""
    lengths: Int32
    """[S]"""
    trained_counts: Int32
    """[S]: `num_trained_tokens`."""
    samples_per_example: Int32
    """[E]"""
    num_cut: int
    problem: str | None = None
    """What is wrong with the first bad record; what is behind it is not in the block."""


def record_blocks(source: str | Path) -> Iterator[list[Record]]:
    """Yield the records of `source`, some at a time.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    records = read_records(source)
    while block := list(islice(records, BLOCK_RECORDS)):
        yield block


def tokenize_block(
    records: Sequence[Record], format_: Format, tokenizer: PreTrainedTokenizerBase, rule: TokenRule
) -> TokenBlock:
    """Return the samples of `records`, which are to be in `format_`, up to the first that cannot be trained on."""
    examples: list[Dialogue | Document] = []
    problem: str | None = None
    for checked in check(records, format_):
        if checked.example is None:
            problem = checked.problem
            break
        examples.append(checked.example)
    samples: list[Sample] = []
    counts: list[int] = []
    num_cut = 0
    try:
        for found, num_longer in cut_samples(
            examples,
            tokenizer,
            max_length=rule.max_length,
            stop_token_ids=rule.stop_token_ids,
            train_on=rule.train_on,
        ):
            samples += found
            num_cut += num_longer
            counts.append(len(found))
    except DataError as error:  # it stands before what was wrong with a record as such
        problem = str(error)
    return TokenBlock(
        tokens=_packed(samples),
        lengths=np.array([len(sample.input_ids) for sample in samples], dtype=np.int32),
        trained_counts=np.array([sample.num_trained_tokens for sample in samples], dtype=np.int32),
        samples_per_example=np.array(counts, dtype=np.int32),
        num_cut=num_cut,
        problem=problem,
    )


def empty_block(*, problem: str) -> TokenBlock:
    """Return a block that only says what is wrong."""
    none = np.empty(0, dtype=np.int32)
    return TokenBlock(
        tokens=none,
        lengths=none,
        trained_counts=none,
        samples_per_example=none,
        num_cut=0,
        problem=problem,
    )


def _packed(samples: Sequence[Sample]) -> Int32:
    ids = np.array([token for sample in samples for token in sample.input_ids], dtype=np.int32)
    labels = np.array([label for sample in samples for label in sample.labels], dtype=np.int32)
    return np.where(labels == IGNORED, ~ids, ids)
