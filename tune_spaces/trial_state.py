"""A trial between two steps, as it travels from one slot to another."""

from dataclasses import dataclass

import torch

from train_jobs.pack import Pack


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialState:
    """The weights and moments of one slot, in the order of the bank's parameters, and how far it is."""

    done: int
    """Optimizer steps."""
    weights: tuple[torch.Tensor, ...]
    exp_avg: tuple[torch.Tensor, ...]
    exp_avg_sq: tuple[torch.Tensor, ...]


def take_state(pack: Pack, slot: int, *, done: int) -> TrialState:
    """Return a copy of what `slot` holds."""
    parameters = list(pack.bank.parameters())
    states = [pack.adamw.state.get(parameter, {}) for parameter in parameters]

    def moments(name: str) -> tuple[torch.Tensor, ...]:
        return tuple(
            state[name][slot].cpu().clone() if name in state else torch.zeros_like(parameter[slot], device="cpu")
            for parameter, state in zip(parameters, states, strict=True)
        )

    return TrialState(
        done=done,
        weights=tuple(parameter.detach()[slot].cpu().clone() for parameter in parameters),
        exp_avg=moments("exp_avg"),
        exp_avg_sq=moments("exp_avg_sq"),
    )


@torch.no_grad()
def put_state(pack: Pack, slot: int, state: TrialState) -> None:
    """Go on in `slot` where `state` was taken."""
    for parameter, weights, first, second in zip(
        pack.bank.parameters(), state.weights, state.exp_avg, state.exp_avg_sq, strict=True
    ):
        parameter.data[slot].copy_(weights)
        moments = pack.adamw.state[parameter]
        if not moments:
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        moments["exp_avg"][slot].copy_(first)
        moments["exp_avg_sq"][slot].copy_(second)
