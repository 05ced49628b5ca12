"""The learning rate over a run, as transformers defines its schedules."""

from collections.abc import Callable

import torch
from transformers import get_scheduler


def lr_schedule(name: str, *, num_warmup_steps: int, num_training_steps: int) -> Callable[[int], float]:
    """Return the function from the optimizer step, counting from 0, to the factor on the peak learning rate.

    A function and not a scheduler: a resumed run then has no state of it to restore.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
