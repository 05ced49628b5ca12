"""The learning rate over a run: the specification's three schedules, as transformers defines them.

Written out, since `transformers.get_scheduler` brings PEFT and torch's compiler with it, a second of each worker's
start, and keeps a state that a resumed run would have to restore.
"""

import math
from collections.abc import Callable

from cluster.presets import SchedulerType


def lr_schedule(name: SchedulerType, *, num_warmup_steps: int, num_training_steps: int) -> Callable[[int], float]:
    """Return the function from the optimizer step, counting from 0, to the factor on the peak learning rate."""
    num_falling_steps = max(1, num_training_steps - num_warmup_steps)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        done = min(1.0, (step - num_warmup_steps) / num_falling_steps)
        match name:
            case "linear":
                return 1.0 - done
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * done))
            case "constant_with_warmup":
                return 1.0

    return factor
