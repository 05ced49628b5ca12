"""A clock for the steps of a `transformers.Trainer`, of which TRL's are."""

import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.training_run import matmul_rates
from train_jobs.tokens import IGNORED


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times each step and counts its tokens, and asks between the steps what the machine can do."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds: list[float] = []
        self.num_tokens: list[int] = []
        self.num_trained_tokens: list[int] = []
        self.matmul_flop_per_s: list[float] = []
        self._rates = matmul_rates(torch.mm)
        self._begin = 0.0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002 (torch's)
        self.num_tokens.append(int(kwargs["attention_mask"].sum()))
        self.num_trained_tokens.append(int((kwargs["labels"][:, 1:] != IGNORED).sum()))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._begin)
        self.matmul_flop_per_s.append(next(self._rates))
