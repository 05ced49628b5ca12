"""Many LoRA adapters on one frozen base model, for training rows and for serving tokens.

B = rows, T = tokens, K = slots, R = largest rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cluster.errors import UserError
from cluster.models.adapter_spec import AdapterSpec, matches
from cluster.models.banked_linear import BankedLinear
from cluster.models.peft_files import AdapterFilesError, read_spec, read_weights, write_adapter
from cluster.models.routing import Routing, Rows, Tokens, route_rows, route_tokens


class UnknownTargetError(UserError, LookupError):
    """No linear layer of the model has one of the names asked for."""


class AdapterBank:
    """K slots for LoRA adapters on `model`, which is frozen and changed in place.

    Every linear layer that `target_modules` name (`nn.Linear`, bitsandbytes' 4-bit and 8-bit layers, GPT-2's
    `Conv1D`) becomes a `BankedLinear`. Ranks up to `max_r`, alphas, dropouts and targets may differ from slot to slot.
    Outside of `rows` and `tokens` the model is the bare base. One forward pass at a time: the routing is shared by all
    layers, whatever thread runs them. A backward pass that recomputes layers (gradient checkpointing) belongs inside
    `rows` too.

    Raises:
        UnknownTargetError: A name in `target_modules` that matches no linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_slots: int,
        max_r: int,
        target_modules: Sequence[str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.num_slots = num_slots
        self.max_r = max_r
        self._linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
        for target in target_modules:
            if not any(matches(name, (target,)) for name in self._linears):
                raise UnknownTargetError(f"no linear layer is called {target}; {_ends(self._linears)} are there")
        model.requires_grad_(requires_grad=False)
        self._routing = Routing(versions=dict.fromkeys(range(num_slots), 0))
        self._specs: list[AdapterSpec | None] = [None] * num_slots
        chosen = {name: module for name, module in self._linears.items() if matches(name, tuple(target_modules))}
        self.layers: dict[str, BankedLinear] = {}
        for index, (name, module) in enumerate(chosen.items()):
            layer = BankedLinear(module, self._routing, index=index, num_slots=num_slots, max_r=max_r, dtype=dtype)
            layer.train(module.training)
            model.set_submodule(name, layer)
            self.layers[name] = layer

    @property
    def specs(self) -> tuple[AdapterSpec | None, ...]:
        """Return what each slot holds."""
        return tuple(self._specs)

    def version(self, k: int) -> int:
        """Return how often slot `k` was given other contents."""
        return self._routing.versions[k]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable weights, A [K, R, d_in] and B [K, R, d_out] of each layer in the model's order."""
        for layer in self.layers.values():
            yield layer.lora_A
            yield layer.lora_B

    def groups(self) -> list[dict[str, Any]]:
        """Return the trainable weights in groups for an optimizer: A, then B, whose rate LoRA+ multiplies."""
        layers = self.layers.values()
        ranks = [layer.ranks for layer in layers]  # they change when adapters do
        return [
            {"params": [layer.lora_A for layer in layers], "ranks": ranks},
            {"params": [layer.lora_B for layer in layers], "ranks": ranks, "is_lora_b": True},
        ]

    def init_slot(self, k: int, spec: AdapterSpec, *, seed: int) -> None:
        """Start a new adapter in slot `k` as PEFT does: A uniform (Kaiming, a = sqrt(5)), B zero.

        The numbers depend on `seed` and `spec` alone, not on `k`, on the bank's size or on any other slot.

        Raises:
            UnknownTargetError: The spec's rank or targets are not in this bank.
        """
        layers = self._layers_of(spec, UnknownTargetError)
        self.clear_slot(k)
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            start = torch.empty(spec.r, layer.lora_A.shape[2])
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            layer.lora_A.data[k, : spec.r] = start.to(layer.lora_A)
            layer.ranks[k] = spec.r
        self._specs[k] = spec

    def load_slot(self, k: int, folder: Path) -> AdapterSpec:
        """Put the PEFT adapter in `folder` into slot `k` and return its spec; on an error the slot stays as it was.

        Raises:
            AdapterFilesError: A file is missing or broken, or the adapter is not one this bank can hold.
        """
        spec, weights = read_spec(folder), read_weights(folder)
        layers = self._layers_of(spec, AdapterFilesError, where=f"{folder}: ")
        shapes = {
            f"{name}.{matrix}.weight": shape
            for name, layer in layers.items()
            for matrix, shape in (
                ("lora_A", (spec.r, layer.lora_A.shape[2])),
                ("lora_B", (layer.lora_B.shape[2], spec.r)),
            )
        }
        for key in sorted(shapes.keys() ^ weights.keys()):
            problem = "is missing" if key in shapes else "belongs to no target module"
            raise AdapterFilesError(f"{folder}: tensor {key} {problem}; is it an adapter of another base model?")
        for key, shape in shapes.items():
            if tuple(weights[key].shape) != shape:
                got = tuple(weights[key].shape)
                raise AdapterFilesError(f"{folder}: tensor {key} is {got}, not {shape}; another base model's adapter?")
        self.clear_slot(k)
        for name, layer in layers.items():
            layer.lora_A.data[k, : spec.r] = weights[f"{name}.lora_A.weight"].to(layer.lora_A)
            layer.lora_B.data[k, : spec.r] = weights[f"{name}.lora_B.weight"].T.to(layer.lora_B)
            layer.ranks[k] = spec.r
        self._specs[k] = spec
        return spec

    def save_slot(self, k: int, folder: Path, *, base_model_name_or_path: str, revision: str | None) -> None:
        """Write slot `k` as a PEFT adapter into `folder`, which may be new."""
        spec = self._specs[k]
        if spec is None:
            raise ValueError(f"slot {k} holds no adapter")
        layers = self._layers_of(spec, UnknownTargetError)
        weights: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            weights[f"{name}.lora_A.weight"] = layer.lora_A.detach()[k, : spec.r].cpu()
            weights[f"{name}.lora_B.weight"] = layer.lora_B.detach()[k, : spec.r].T.cpu()
        write_adapter(
            folder,
            spec,
            weights,
            base_model_name_or_path=base_model_name_or_path,
            revision=revision,
            fan_in_fan_out=any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        )

    def clear_slot(self, k: int) -> None:
        """Empty slot `k`; the optimizer's state of the slot is not ours to forget."""
        self._specs[k] = None
        self._routing.versions[k] += 1
        for layer in self.layers.values():
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.data[k, : layer.ranks[k]].zero_()
            layer.ranks[k] = 0

    def place_grads(self) -> None:
        """Give the weights gradients that stay; whoever uses them sets those of each slot to zero again.

        For one process: what exchanges gradients waits for autograd to add them.
        """
        for layer in self.layers.values():
            layer.place_grads()

    def slot_weights(self, k: int) -> list[torch.Tensor]:
        """Return what slot `k` holds of each of `parameters` that it has a part of, [r, d], for reading and writing."""
        ranks = [layer.ranks[k] for layer in self.layers.values() for _ in range(2)]
        return [p.data[k, :r] for p, r in zip(self.parameters(), ranks, strict=True) if r]

    @contextmanager
    def rows(
        self,
        slot_of_row: Sequence[int],
        *,
        dropout_keys: Sequence[int] = (),
        lengths: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Send row i of the passes inside through slot `slot_of_row[i]`; the rows of one slot are one block.

        With `lengths` [B], rows lie end to end in one row, `[1, N, d]`, and are that long; else they are `[B, T, d]`.
        `dropout_keys` [B] seed each row's dropout and are needed where the model trains and an adapter has dropout: a
        key names the sample's place in its own run, so that its mask is the same in a pack, alone, on any worker.

        Raises:
            ValueError: Rows of a slot that lie apart, an empty slot, missing dropout keys.
        """
        routing = route_rows(
            slot_of_row, self._specs, training=self.model.training, dropout_keys=dropout_keys, lengths=lengths
        )
        with self._routed(routing):
            yield

    @contextmanager
    def tokens(self, slot_of_token: torch.Tensor) -> Iterator[None]:
        """Send token t of the passes inside, `[1, T, d]` each, through slot `slot_of_token[t]`; -1 is the bare base.

        For inference only: gradients do not reach the adapters. Pass a CPU tensor, since the grouping happens there.

        Raises:
            ValueError: An empty slot.
        """
        routing = route_tokens(slot_of_token, self._specs, versions=self._routing.versions, like=self._any_weight)
        with self._routed(routing), torch.no_grad():
            yield

    @property
    def _any_weight(self) -> torch.Tensor:
        return next(self.parameters())

    @contextmanager
    def _routed(self, routing: Rows | Tokens) -> Iterator[None]:
        if self._routing.current is not None:
            raise ValueError("this bank is in a pass already")
        self._routing.current = routing
        try:
            yield
        finally:
            self._routing.current = None

    def _layers_of(
        self, spec: AdapterSpec, error: type[UnknownTargetError | AdapterFilesError], *, where: str = ""
    ) -> dict[str, BankedLinear]:
        if spec.r > self.max_r:
            raise error(f"{where}r is {spec.r}; this bank holds ranks up to {self.max_r}")
        for target in spec.target_modules:
            names = [name for name in self._linears if matches(name, (target,))]
            if not names or any(name not in self.layers for name in names):
                raise error(f"{where}target_modules has {target}; this bank adapts {_ends(self.layers)}")
        return {name: layer for name, layer in self.layers.items() if spec.targets(name)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _ends(names: dict[str, nn.Linear] | dict[str, BankedLinear] | dict[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
