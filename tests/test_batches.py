"""Batches follow from the seed alone."""

import random

import numpy as np
import pytest
import torch

from train_jobs.batches import DataOrder, chunk, collate, opening_of, passes_of
from train_jobs.tokens import Sample

LENGTHS = np.array(random.Random(0).choices(range(5, 200), k=101), dtype=np.int32)  # noqa: S311 -- no secrets


def test_every_sample_comes_once_an_epoch() -> None:
    order = DataOrder(lengths=LENGTHS, batch_size=8, seed=3)
    assert order.steps_per_epoch == 13  # 101 = 12 x 8 + 5
    for epoch in range(3):
        batches = [order.batch(epoch * 13 + i) for i in range(13)]
        assert sorted(i for batch in batches for i in batch) == list(range(101))
        assert sorted(map(len, batches)) == [5] + [8] * 12


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    order, same, other = (DataOrder(lengths=LENGTHS, batch_size=8, seed=s) for s in (3, 3, 4))
    assert [order.batch(i) for i in range(30)] == [same.batch(i) for i in range(30)]
    assert order.batch(20) == same.batch(20)
    assert [order.batch(i) for i in range(13)] != [other.batch(i) for i in range(13)]
    assert [order.batch(i) for i in range(13)] != [order.batch(13 + i) for i in range(13)]


@pytest.mark.parametrize("num_rows", [1, 5, 8, 13])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 8])
def test_chunks_cover_a_batch_evenly(num_rows: int, num_chunks: int) -> None:
    chunks = [chunk(num_rows, num_chunks, i) for i in range(num_chunks)]
    assert sorted(row for rows in chunks for row in rows) == list(range(num_rows))
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


def test_workers_get_short_and_long_samples() -> None:
    batch = DataOrder(lengths=LENGTHS, batch_size=101, seed=3).batch(0)
    tokens = [sum(LENGTHS[batch[i]] for i in chunk(101, 2, worker)) for worker in range(2)]
    # in order of length, neighbours differ by a few tokens: the shares differ by one sample at most
    assert abs(tokens[0] - tokens[1]) <= max(LENGTHS)


def test_samples_lie_end_to_end_and_none_is_predicted_by_the_one_before() -> None:
    first = Sample(input_ids=(5, 6, 7), labels=(-100, 6, 7))
    second, third = Sample(input_ids=(8, 9), labels=(8, 9)), Sample(input_ids=(4,), labels=(4,))
    batch = collate([[first, second], [third]], device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9, -100]]
    assert batch.blocks.tolist() == [[0, 0, 0, 0, 0, 1]]
    assert (batch.lengths, batch.counts) == ((3, 2, 1), (2, 1))


def test_what_all_samples_begin_with_is_in_a_block_once() -> None:
    opening = tuple(range(10, 18))
    first = Sample(input_ids=(*opening, 1, 2), labels=(-100,) * 9 + (2,))
    second = Sample(input_ids=(*opening, 3), labels=(-100,) * 9)
    other = Sample(input_ids=(4, 5), labels=(-100, 5))
    batch = collate([[first, other, second], [other]], device=torch.device("cpu"), opening=opening)
    assert batch.input_ids.tolist() == [[*opening, 1, 2, 4, 5, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 8, 0, 1]]
    assert batch.labels.tolist() == [[-100] * 8 + [-100, 2, -100, 5, -100, -100, 5]]
    assert (batch.lengths, batch.counts) == ((8, 2, 2, 1, 2), (4, 1))
    assert batch.parents == (None, 0, None, 0, None)


def test_an_opening_ends_before_what_predicts_a_label() -> None:
    begin = tuple(range(10, 22))
    samples = [Sample(input_ids=(*begin, i), labels=(-100,) * 10 + (*begin[10:], i)) for i in range(3)]
    assert opening_of(samples) == begin[:9]  # the label of the token at 10 is predicted at 9
    assert opening_of([*samples, Sample(input_ids=(*begin[:5], 1), labels=(-100,) * 6)]) == ()
    assert opening_of([]) == ()


def test_passes_take_neighbours_up_to_a_limit_and_one_alone_whatever_it_has() -> None:
    assert passes_of([3, 4, 5, 20, 1], limit=8) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
