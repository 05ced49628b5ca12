"""The predicted gain of a pack, by hand."""

import pytest

from benchmarks.pack_roofline import Accelerator, Work, adapter_s, base_s, gain

# 1,000 operations and 100 bytes a second; a base of 10 weights in 20 bytes, an adapter of 1 weight
MACHINE = Accelerator(flop_per_s=1000, bytes_per_s=100)
WORK = Work(base_parameters=10, base_bytes=20, adapter_parameters=1)


def test_few_tokens_wait_for_the_weights_and_many_for_arithmetic() -> None:
    assert base_s(WORK, MACHINE, num_tokens=2) == pytest.approx(0.4)  # 2 x 20 / 100, against 4 x 10 x 2 / 1000 = 0.08
    assert base_s(WORK, MACHINE, num_tokens=100) == pytest.approx(4.0)  # 4 x 10 x 100 / 1000


def test_an_adapter_takes_its_products_and_a_pass_of_its_optimizer() -> None:
    assert adapter_s(WORK, MACHINE, num_tokens=2) == pytest.approx(0.08 + 0.28)  # 2 x 4 / 100, and 28 / 100
    assert adapter_s(WORK, MACHINE, num_tokens=100) == pytest.approx(0.6 + 0.28)  # 6 x 100 / 1000


def test_the_gain_ends_where_one_trial_fills_the_machine() -> None:
    # alone 0.4 + 0.36; four together read the base once (4 x 0.08 = 0.32 is still less than 0.4): 0.4 + 4 x 0.36
    assert gain(WORK, MACHINE, num_tokens=2, num_trials=4) == pytest.approx(4 * 0.76 / 1.84)
    assert gain(WORK, MACHINE, num_tokens=100, num_trials=4) == pytest.approx(1.0)
