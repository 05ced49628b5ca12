"""A model that is trained whole, in the shape of a bank of adapters: its one slot is the model itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class WholeModel:
    """`model` with all its weights trainable; what a loop asks of an `AdapterBank`, it asks of this too.

    The weights before the first step are the bare base; afterwards there is no bare base any more.
    """

    num_slots = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.requires_grad_(requires_grad=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable weights, tied ones once."""
        yield from self.model.parameters()

    def groups(self) -> list[dict[str, Any]]:
        """Return the weights as the one group of an optimizer."""
        return [{"params": list(self.model.parameters())}]

    @contextmanager
    def rows(
        self,
        slot_of_row: Sequence[int],
        *,
        dropout_keys: Sequence[int] = (),  # noqa: ARG002 -- as a bank's
        lengths: Sequence[int] = (),  # noqa: ARG002
    ) -> Iterator[None]:
        """Send every row of the passes inside through the model; no dropout is drawn."""
        if set(slot_of_row) != {0}:
            raise ValueError(f"a whole model has slot 0 alone, not {sorted(set(slot_of_row))}")
        yield

    def save(self, folder: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write `config.json` and the weights `state_dict`, which may be gathered from several workers, to `folder`."""
        once = {name for name, _ in self.model.named_parameters()}
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - once
        # Gathered, a tied weight is two tensors, and both would be written.
        kept = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        self.model.save_pretrained(folder, state_dict=kept)
