"""Which adapter each row or token of a forward pass goes through.

B = rows, T = tokens, K = slots of the bank, S = ranks of all adapters in the pass laid side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat

import torch

from cluster.models.adapter_spec import AdapterSpec
from cluster.models.lora_linear import Blocks

# Tokens x mean rank up to which one dense product over all adapters of the pass is cheaper than a product per adapter:
# it starts two kernels instead of two per adapter, and with few tokens the time goes into reading the weights, not into
# arithmetic. Measured on two cores: 8 adapters of rank 8 break even between 120 and 240 tokens.
MAX_DENSE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A training pass: contiguous blocks of rows, one per adapter."""

    slots: tuple[int, ...]
    """The slot of each block, in order."""
    counts: tuple[int, ...]
    """Rows of each block."""
    lengths: tuple[int, ...] | None
    """Tokens of each row, where rows lie end to end in one; None where each is a row of the tensor."""
    scaling: tuple[float, ...]
    """Of each block's adapter, over the share of its inputs that dropout keeps."""
    dropout: tuple[float, ...]
    """Dropout of each row; empty when no row has any or the model does not train."""
    dropout_keys: tuple[int, ...]
    """Seed of each row's dropout; empty like `dropout`."""

    def blocks(
        self, shape: torch.Size, ranks: Sequence[int], grads: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Blocks:
        """Return the tokens of each block in a tensor of `shape`, [B, T, d] or [1, N, d].

        `ranks` are those of all slots in a layer, and `grads` where its gradients are added.

        Raises:
            ValueError: Another number of rows or tokens than the pass has.
        """
        expected = (1, sum(self.lengths)) if self.lengths else (sum(self.counts), shape[1])
        if tuple(shape[:2]) != expected:
            raise ValueError(
                f"{shape[0]} x {shape[1]} tokens in the pass, {expected[0]} x {expected[1]} in its routing"
            )
        lengths = iter(self.lengths or repeat(shape[1]))
        sizes = tuple(sum(islice(lengths, count)) for count in self.counts)
        chosen = tuple(ranks[slot] for slot in self.slots)
        return Blocks(slots=self.slots, sizes=sizes, scaling=self.scaling, ranks=chosen, grads=grads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The tokens of one adapter, for passes too long for one dense product."""

    ranks: slice
    """Where the adapter's ranks are among the S."""
    tokens: slice | torch.Tensor
    """A slice where the tokens are contiguous, else their indices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A serving pass: every token chooses its adapter, or none."""

    slots: tuple[int, ...]
    """The slots in the pass, ascending."""
    versions: tuple[tuple[int, int], ...]
    """Each slot and the number of its changes: what a packed copy of the pass's adapters is good for."""
    ranks: tuple[int, ...]
    """The rank of each."""
    scaling: tuple[float, ...]
    """Of each."""
    num_tokens: int
    slot_of_token: torch.Tensor  # [T], on the CPU; -1 for the bare base
    rank_of_token: torch.Tensor  # [T], on the CPU; 0 for the bare base
    scales: torch.Tensor  # [T], float32, on the CPU: `scaling` of each token
    mask: torch.Tensor | None  # [T, S]: 1 where token and rank belong together, else 0
    segments: tuple[Segment, ...]
    """Used where `mask` is None."""


@dataclass(kw_only=True, slots=True)
class Routing:
    """What the layers of one bank look at during a pass.

    A plain attribute, not a context variable: autograd and continuous batching run layers in threads of their own,
    which do not inherit the caller's context. So one bank runs one pass at a time.
    """

    current: Rows | Tokens | None = None
    versions: dict[int, int] = field(default_factory=dict)
    """Counts the changes of each slot, so that layers know when packed copies are out of date."""


def route_rows(
    slot_of_row: Sequence[int],
    specs: Sequence[AdapterSpec | None],
    *,
    training: bool,
    dropout_keys: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> Rows:
    """Return the routing of a pass over rows; no dropout unless `training`.

    Raises:
        ValueError: The rows of a slot are not one block, a slot is empty, keys or lengths are missing.
    """
    slots = tuple(dict.fromkeys(slot_of_row))
    counts = tuple(map(list(slot_of_row).count, slots))
    if not slots or list(slot_of_row) != [slot for slot, n in zip(slots, counts, strict=True) for _ in range(n)]:
        raise ValueError(f"rows must come in contiguous blocks, one per slot, got {list(slot_of_row)}")
    if lengths is not None and len(lengths) != len(slot_of_row):
        raise ValueError(f"{len(slot_of_row)} rows need as many lengths, got {len(lengths)}")
    chosen = [_occupied(specs, slot) for slot in slots]
    dropout = tuple(spec.lora_dropout for spec, n in zip(chosen, counts, strict=True) for _ in range(n))
    if not training or not any(dropout):
        dropout, dropout_keys = (), ()
    if len(dropout) != len(dropout_keys):
        raise ValueError(f"{len(dropout)} rows with dropout need as many dropout_keys, got {len(dropout_keys)}")
    return Rows(
        slots=slots,
        counts=counts,
        lengths=None if lengths is None else tuple(lengths),
        scaling=tuple(spec.scaling / (1 - spec.lora_dropout if dropout else 1) for spec in chosen),
        dropout=dropout,
        dropout_keys=tuple(dropout_keys),
    )


def route_tokens(
    slot_of_token: torch.Tensor,
    specs: Sequence[AdapterSpec | None],
    *,
    versions: Mapping[int, int],
    like: torch.Tensor,
) -> Tokens:
    """Return the routing of a serving pass over `slot_of_token` [T], -1 for the bare base, for weights `like` these.

    `versions` counts the changes of each slot.

    Raises:
        ValueError: A slot that holds no adapter.
    """
    slot_of_token = slot_of_token.to("cpu", torch.long).reshape(-1)
    slots = tuple(sorted(set(slot_of_token.tolist()) - {-1}))
    chosen = [_occupied(specs, slot) for slot in slots]
    ranks = tuple(spec.r for spec in chosen)
    scaling = tuple(spec.scaling for spec in chosen)
    # The last element is that of slot -1.
    by_slot = torch.zeros(2, 1 + max(slots, default=-1) + 1, dtype=torch.float64)
    by_slot[:, list(slots)] = torch.tensor([ranks, scaling], dtype=torch.float64)
    rank_of_token, scales = by_slot[:, slot_of_token]
    dense = len(slots) == 1 or len(slot_of_token) * sum(ranks) <= MAX_DENSE * len(slots)
    return Tokens(
        slots=slots,
        versions=tuple((slot, versions[slot]) for slot in slots),
        ranks=ranks,
        scaling=scaling,
        num_tokens=len(slot_of_token),
        slot_of_token=slot_of_token,
        rank_of_token=rank_of_token.long(),
        scales=scales.float(),
        mask=_mask(slot_of_token, slots, ranks).to(like) if dense else None,
        segments=() if dense else _segments(slot_of_token, slots, chosen, like.device),
    )


def _occupied(specs: Sequence[AdapterSpec | None], slot: int) -> AdapterSpec:
    spec = specs[slot] if 0 <= slot < len(specs) else None
    if spec is None:
        raise ValueError(f"slot {slot} of {len(specs)} holds no adapter")
    return spec


def _mask(slot_of_token: torch.Tensor, slots: Sequence[int], ranks: Sequence[int]) -> torch.Tensor:
    slot_of_rank = torch.tensor(slots, dtype=torch.long).repeat_interleave(torch.tensor(ranks, dtype=torch.long))
    return slot_of_token[:, None] == slot_of_rank[None, :]


def _segments(
    slot_of_token: torch.Tensor, slots: Sequence[int], specs: Sequence[AdapterSpec], device: torch.device
) -> tuple[Segment, ...]:
    segments, start = [], 0
    for slot, spec in zip(slots, specs, strict=True):
        tokens = (slot_of_token == slot).nonzero().flatten()
        first, last = int(tokens[0]), int(tokens[-1])
        is_contiguous = last - first + 1 == len(tokens)
        segments.append(
            Segment(
                ranks=slice(start, start + spec.r),
                tokens=slice(first, last + 1) if is_contiguous else tokens.to(device),
            )
        )
        start += spec.r
    return tuple(segments)
