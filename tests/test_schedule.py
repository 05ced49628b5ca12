"""Schedules by hand."""

import pytest

from train_jobs.schedule import lr_schedule

# 2 steps of warm-up in 10: up by halves, then down in eighths, or along half a cosine, or level
EXPECTED = {
    "linear": [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [0, 0.5, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
    "constant_with_warmup": [0, 0.5, *[1] * 8],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rates_follow_the_specifications_schedules(name: str) -> None:
    factor = lr_schedule(name, num_warmup_steps=2, num_training_steps=10)
    assert [factor(step) for step in range(10)] == pytest.approx(EXPECTED[name], abs=1e-6)
