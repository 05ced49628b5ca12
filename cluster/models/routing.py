"""Which adapter each row or token of a forward pass goes through.

B = rows, T = tokens, K = slots of the bank, S = ranks of all adapters in the pass laid side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from cluster.models.adapter_spec import AdapterSpec

# Tokens x mean rank up to which one dense product over all adapters of the pass is cheaper than a product per adapter:
# it starts two kernels instead of two per adapter, and with few tokens the time goes into reading the weights, not into
# arithmetic. Measured on two cores: 8 adapters of rank 8 break even between 120 and 240 tokens.
MAX_DENSE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A training pass: equal contiguous blocks of rows, one per adapter."""

    slots: tuple[int, ...]
    """The slot of each block, in order."""
    num_rows: int
    scaling: torch.Tensor  # [blocks, 1, 1], over the share of the inputs that dropout keeps
    dropout: tuple[float, ...]
    """Dropout of each row; empty when no row has any or the model does not train."""
    dropout_keys: tuple[int, ...]
    """Seed of each row's dropout; empty like `dropout`."""


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
    firsts: torch.Tensor  # [T], on the CPU: the first of each token's ranks among the S
    counts: torch.Tensor  # [T], on the CPU: how many ranks it has; 0 for the bare base
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
    like: torch.Tensor,
    training: bool,
    dropout_keys: Sequence[int],
) -> Rows:
    """Return the routing of a pass over rows, for weights `like` these; no dropout unless `training`.

    Raises:
        ValueError: The rows of a slot are not one block, blocks differ in size, a slot is empty, keys are missing.
    """
    slots = tuple(dict.fromkeys(slot_of_row))
    block = len(slot_of_row) // max(len(slots), 1)
    if not slots or list(slot_of_row) != [slot for slot in slots for _ in range(block)]:
        raise ValueError(f"rows must come in equal contiguous blocks per slot, got {list(slot_of_row)}")
    chosen = [_occupied(specs, slot) for slot in slots]
    dropout = tuple(spec.lora_dropout for spec in chosen for _ in range(block))
    if not training or not any(dropout):
        dropout, dropout_keys = (), ()
    if len(dropout) != len(dropout_keys):
        raise ValueError(f"{len(dropout)} rows with dropout need as many dropout_keys, got {len(dropout_keys)}")
    scaling = [spec.scaling / (1 - spec.lora_dropout if dropout else 1) for spec in chosen]
    return Rows(
        slots=slots,
        num_rows=len(slot_of_row),
        scaling=torch.tensor(scaling, dtype=like.dtype, device=like.device).view(-1, 1, 1),
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
    slot_list = slot_of_token.tolist()
    starts = dict(zip(slots, accumulate(ranks, initial=0), strict=False))
    sizes = dict(zip(slots, ranks, strict=True))
    dense = len(slots) == 1 or len(slot_of_token) * sum(ranks) <= MAX_DENSE * len(slots)
    return Tokens(
        slots=slots,
        versions=tuple((slot, versions[slot]) for slot in slots),
        ranks=ranks,
        scaling=tuple(spec.scaling for spec in chosen),
        num_tokens=len(slot_of_token),
        firsts=torch.tensor([starts.get(slot, 0) for slot in slot_list]),
        counts=torch.tensor([sizes.get(slot, 0) for slot in slot_list]),
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
