"""What a point of a space makes of the plan's own adapter."""

from dataclasses import replace

import pytest
from test_pack import LINEARS, adapter

from cluster.catalog import find
from tune_spaces.trial_jobs import adapter_job, default_values, size_metrics


def test_a_point_changes_what_it_names_and_nothing_else() -> None:
    own = adapter(1, r=8)
    made = adapter_job(own, {"r": 16, "learning_rate": 3e-4, "targets": "attention", "lr_scheduler_type": "cosine"})
    assert (made.spec.r, made.spec.target_modules) == (16, LINEARS[:4])
    assert (made.learning_rate, made.lr_scheduler_type) == (3e-4, "cosine")
    assert replace(made, spec=own.spec, learning_rate=own.learning_rate, lr_scheduler_type="linear") == own
    assert adapter_job(own, default_values(own)) == own, "the plan's own values change nothing"


def test_sizes_are_those_of_the_adapter_in_fp32() -> None:
    card = find("smollm2-135m-instruct")
    # 30 layers of 576: q and o 576 -> 576, k and v 576 -> 192, gate and up 576 -> 1536, down 1536 -> 576
    per_rank = 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    sizes = size_metrics(card, adapter(1, r=8), weight_bytes=4 * 8 * per_rank * 50)
    assert sizes["adapter_bytes"] == 4 * 8 * per_rank
    assert sizes["latency_ratio"] == pytest.approx(1.02)
