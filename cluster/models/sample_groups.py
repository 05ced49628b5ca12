"""Which samples of a pass are one product of attention, and where their tokens lie in it.

Lengths are rounded up, each by itself, so that what is computed for a sample does not depend on its neighbours. What
is behind its end is seen by none of its tokens: attention is causal.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

MULTIPLE = 16
"""Of a sample's tokens in a product. Short samples are many, and each product has its price; padding has little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The products of a pass, and the rows [N] of its tokens that each of them reads and writes."""

    shapes: tuple[tuple[int, int, int], ...]
    """Of each product: samples, queries and keys of each."""
    queries: torch.Tensor
    """[sum of samples times queries]: the token of each query."""
    keys: torch.Tensor
    """[sum of samples times keys]: the token of each key."""
    tokens: torch.Tensor
    """[N]: the query of each token."""

    def split_queries(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each product's part of `rows` [queries, ..], [samples, its queries, ..]."""
        yield from _split(rows, [(count, num_queries) for count, num_queries, _ in self.shapes])

    def split_keys(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each product's part of `rows` [keys, ..], [samples, its keys, ..]."""
        yield from _split(rows, [(count, num_keys) for count, _, num_keys in self.shapes])


def group_samples(
    lengths: Sequence[int], parents: Sequence[int | None], *, masked_keys: int, device: torch.device
) -> Groups:
    """Return the products of samples of `lengths`; one with a number in `parents` sees that sample before itself.

    Up to `masked_keys` keys it leaves that one's queries out, and its product needs a mask; beyond, both are one
    sample, whose first part is computed for nothing.
    """
    ends = list(itertools.accumulate(lengths))
    rows = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    members: dict[tuple[int, int], list[tuple[int, list[int], list[int]]]] = defaultdict(list)
    for sample, parent in enumerate(parents):
        own = [*rows[sample], *[rows[sample][-1]] * (-lengths[sample] % MULTIPLE)]
        keys = own if parent is None else [*rows[parent], *own]
        queries = own if len(keys) <= masked_keys else keys
        members[len(queries), len(keys)].append((sample, queries, keys))
    tokens, all_queries, all_keys = [0] * ends[-1], [], []
    for sample, queries, keys in itertools.chain(*members.values()):
        all_queries += queries
        all_keys += keys
        first = len(all_queries) - lengths[sample] - (-lengths[sample] % MULTIPLE)
        tokens[rows[sample].start : rows[sample].stop] = range(first, first + lengths[sample])
    return Groups(
        shapes=tuple((len(samples), *shape) for shape, samples in members.items()),
        queries=torch.tensor(all_queries, device=device),
        keys=torch.tensor(all_keys, device=device),
        tokens=torch.tensor(tokens, device=device),
    )


def _split(rows: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
    parts = rows.split_with_sizes([count * num_rows for count, num_rows in shapes])
    for part, shape in zip(parts, shapes, strict=True):
        yield part.view(*shape, *part.shape[1:])
