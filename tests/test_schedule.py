"""Schedules by hand, and against transformers."""

from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from cluster.presets import SchedulerType
from train_jobs.schedule import lr_schedule

# 2 steps of warm-up in 10: up by halves, then down in eighths, or along half a cosine, or level
EXPECTED: dict[SchedulerType, list[float]] = {
    "linear": [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [0, 0.5, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
    "constant_with_warmup": [0, 0.5, *[1] * 8],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rates_follow_the_specifications_schedules(name: SchedulerType) -> None:
    factor = lr_schedule(name, num_warmup_steps=2, num_training_steps=10)
    assert [factor(step) for step in range(10)] == pytest.approx(EXPECTED[name], abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_rates_are_those_of_transformers(name: SchedulerType, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=23).lr_lambdas[0]
    ours = lr_schedule(name, num_warmup_steps=warmup, num_training_steps=23)
    assert [ours(step) for step in range(23)] == pytest.approx([theirs(step) for step in range(23)])
