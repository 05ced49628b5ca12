"""A trial between two steps, as it travels from one slot to another."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from train_jobs.pack import Pack


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialState:
    """The weights and moments of one slot in the order of the bank's parameters, and how far it is.

    As arrays: pickle copies those once, and tensors several times.
    """

    done: int
    """Optimizer steps."""
    weights: tuple[npt.NDArray[Any], ...]
    exp_avg: tuple[npt.NDArray[Any], ...]
    exp_avg_sq: tuple[npt.NDArray[Any], ...]


def take_state(pack: Pack, slot: int, *, done: int) -> TrialState:
    """Return a copy of what `slot` holds."""
    return TrialState(
        done=done,
        weights=_copies(pack.adapters.slot_weights(slot)),
        exp_avg=_copies(_moments(pack, slot, "exp_avg")),
        exp_avg_sq=_copies(_moments(pack, slot, "exp_avg_sq")),
    )


@torch.no_grad()
def put_state(pack: Pack, slot: int, state: TrialState) -> None:
    """Go on in `slot`, which holds an adapter of the same ranks, where `state` was taken."""
    for places, values in (
        (pack.adapters.slot_weights(slot), state.weights),
        (_moments(pack, slot, "exp_avg"), state.exp_avg),
        (_moments(pack, slot, "exp_avg_sq"), state.exp_avg_sq),
    ):
        for place, value in zip(places, values, strict=True):
            place.copy_(torch.from_numpy(value))


def _moments(pack: Pack, slot: int, name: str) -> list[torch.Tensor]:
    found = pack.adamw.slot_moments(slot, name)
    return [found[parameter] for parameter in pack.bank.parameters() if parameter in found]


def _copies(tensors: list[torch.Tensor]) -> tuple[npt.NDArray[Any], ...]:
    return tuple(tensor.detach().cpu().clone().numpy() for tensor in tensors)
